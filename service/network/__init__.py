"""Requests to other hosts: which addresses are allowed, downloads of keyframes, deliveries of webhooks."""
