"""Small architectures that the tests export: `other` only with --slow. They differ in depth, heads and options."""

from sparsectrl_lcm.benchmarks.random_checkpoints import Architecture

ARCHITECTURES = {
    "sd15_like": Architecture(channels=(32, 64), sample_size=8),  # a first and a last level
    "other": Architecture(
        channels=(24, 48, 48),
        layers=2,
        heads=(2, 6, 6),
        motion_heads=3,
        groups=6,
        text_width=40,
        text_layers=3,
        text_heads=5,
        vae_channels=(16, 32, 32),
        tiny_channels=12,
        tiny_layers=2,
        motion_mid_block=True,
        linear_projection=True,
        sample_size=12,
        control_channels=(8, 12, 16),
        channel_order="bgr",
    ),
}
