"""The HTTP edge: the ASGI application, its middlewares, the listeners and what they accept from a connection."""
