"""The inputs of a build's check are as large as those of a request."""

import numpy as np
import pytest
from conftest import Exported
from pictures import pictures
from sparsectrl_lcm.engine.check import open_portable, random_inputs
from sparsectrl_lcm.runtime.format.bundle import Bundle, demo_bundle


@pytest.mark.parametrize("demo", [True, False])
def test_latents_of_keyframes_are_of_the_size_that_the_vae_gives(sd15_like: Exported, demo: bool) -> None:
    """A VAE with random weights gives small latents, the demo model's large ones; int8's ranges are made for those."""
    bundle = Bundle.load(demo_bundle() if demo else sd15_like.bundle)
    images = np.stack([np.asarray(image) for image in pictures(3, 64, 64)])
    (latents,) = open_portable(bundle.folder / bundle.graph("vae_encoder").path).run(None, {"image": images})
    assert latents.std() > 1.4 if demo else latents.std() < 0.2
    checked = random_inputs(bundle, "controlnet_rgb", seed=1)["conditioning"]
    assert checked.std() == pytest.approx(latents.std(), rel=0.3)
    assert checked.std(axis=(2, 3)).min() > 0.2 * latents.std(), "squares of different colours"
    assert not np.array_equal(checked, random_inputs(bundle, "controlnet_rgb", seed=2)["conditioning"])
