"""The runtime behind HTTP. It speaks fal's protocol, so that fal's own clients work with it."""
