"""Requests to other hosts: allowed addresses, downloads of keyframes, deliveries of webhooks."""
