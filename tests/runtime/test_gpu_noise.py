"""When a GPU's noise is drawn."""

from types import SimpleNamespace
from typing import Any

import pytest
from fakes.emulated_demo import SMALL, emulated_demo, keyframes, small_clip
from fakes.gpu_emulation import EmulatedEngine
from sparsectrl_lcm.runtime.loop.noise import TorchGenerator


@pytest.fixture
def demo() -> SimpleNamespace:
    return emulated_demo(SMALL)


def test_later_noise_is_drawn_while_the_device_works(demo: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """In plain runs and replays, of new and of kept conditioning: what a part needs is drawn just before it."""
    calls: list[str] = demo.cudart.calls
    randn, enqueue = TorchGenerator.randn, EmulatedEngine.enqueue

    def watched_randn(self: TorchGenerator, *args: Any) -> Any:
        calls.append("noise")
        return randn(self, *args)

    def watched_enqueue(self: EmulatedEngine, addresses: Any) -> None:
        calls.append(self.graph)
        enqueue(self, addresses)

    monkeypatch.setattr(TorchGenerator, "randn", watched_randn)
    monkeypatch.setattr(EmulatedEngine, "enqueue", watched_enqueue)

    def order(picture: int) -> list[str]:
        calls.clear()
        small_clip(demo, "a boat", keyframes(seed=picture), seed=len(calls))
        shown = {"noise", "text_encoder", "controlnet_scribble", "unet", "lcm_update", "vae_decoder", "cudaGraphLaunch"}
        begin = calls.index("cudaStreamBeginCapture") if "cudaStreamBeginCapture" in calls else None
        return [name for name in calls[:begin] if name in shown]

    conditioning = ["text_encoder", *["controlnet_scribble"] * 4]
    rest = ["noise"] * 3 + ["lcm_update", *["unet", "lcm_update"] * 3, "vae_decoder"]
    assert order(1) == [*conditioning, "noise", "unet", *rest]
    assert order(1) == ["noise", "unet", *rest]
    order(2)
    assert order(3) == ["cudaGraphLaunch", "noise", "cudaGraphLaunch", *["noise"] * 3, "cudaGraphLaunch"]
    assert order(3) == ["noise", "cudaGraphLaunch", *["noise"] * 3, "cudaGraphLaunch"]
