"""The runtime behind HTTP: fal's protocol, spoken to fal's own clients."""
