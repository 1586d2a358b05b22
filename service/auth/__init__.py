"""Who is calling: API keys, signed tokens, and the signatures that webhooks carry."""
