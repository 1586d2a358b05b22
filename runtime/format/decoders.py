"""The decoders that make frames from latents."""

DECODERS = {"full": "vae_decoder", "tiny": "vae_decoder_tiny"}
"""The graphs that decode latents to frames, by their names in a request. Only some bundles have tiny."""
