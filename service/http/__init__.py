"""The HTTP edge: the ASGI application, its middlewares, the listeners, and the limits of a connection."""
