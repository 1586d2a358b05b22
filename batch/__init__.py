"""Makes clips in a folder from a file of requests. A batch can be stopped at any moment and resumed."""
