"""The HTTP edge: middlewares, request bodies, listeners, and the limits of a connection."""
