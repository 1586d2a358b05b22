"""The loop on the host, and the backends that compute there."""
