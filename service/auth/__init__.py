"""Authentication: API keys, signed tokens, and the signatures of webhooks."""
