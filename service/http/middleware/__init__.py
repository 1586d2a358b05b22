"""The middlewares, one concern each; app.py puts them in order."""
