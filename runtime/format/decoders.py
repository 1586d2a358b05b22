"""The decoders that make frames of latents."""

DECODERS = {"full": "vae_decoder", "tiny": "vae_decoder_tiny"}
"""The graphs that make frames of latents, by the names that a request gives them; tiny is in some bundles only."""
