"""The loop on the device: every run of an engine that makes a clip, in order. Written once for all GPU backends."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

Source = Literal["scribble", "rgb", "none", "kept"]
"""Where the conditioning comes from: keyframes of a kind, no keyframes, or what an earlier request left."""


@dataclass(frozen=True, slots=True)
class Variant:
    """What decides which engines run and where their memory lies; one CUDA graph each.

    Attributes:
        steps: LCM steps.
        prompts: 2 with guidance, the negative one first, else 1.
        source: where the conditioning comes from.
        decoder: the graph that makes the frames.
        stepwise: whether SparseCtrl runs just before each step, where residuals of all steps take too much memory.
    """

    steps: int
    prompts: int
    source: Source
    decoder: str
    stepwise: bool = False


class Machine(Protocol):
    """What the program runs on: engines, and the address of each tensor."""

    residual_names: tuple[str, ...]
    chunks: int

    def enqueue(self, graph: str, **addresses: int) -> None:
        """Puts a run of a graph's engine on the stream."""

    def at(self, name: str, index: int = 0) -> int:
        """Address of an input or buffer."""

    def prompt_embeds(self, variant: Variant, prompt: int) -> int:
        """Address of a prompt's embeddings."""

    def residual(self, variant: Variant, step: int, prompt: int, name: str) -> int:
        """Address of a residual; of zeros where there are no keyframes."""


def program(machine: Machine, variant: Variant) -> Iterator[tuple[str, int]]:
    """Enqueues a whole request; yields stage and step when a unit of work has been put on the stream."""
    if variant.source != "kept":
        for prompt in range(variant.prompts):
            machine.enqueue(
                "text_encoder",
                input_ids=machine.at("input_ids", prompt),
                prompt_embeds=machine.prompt_embeds(variant, prompt),
            )
        yield "text", 1
    if variant.source == "rgb":
        machine.enqueue("vae_encoder", image=machine.at("pictures"), latents=machine.at("conditioning"))
    if variant.source in ("scribble", "rgb"):
        yield "keyframes", 1
        if not variant.stepwise:
            for step in range(variant.steps):
                _control(machine, variant, step)
                yield "control", step + 1
    for step in range(variant.steps):
        if variant.stepwise:
            _control(machine, variant, step)
        _denoise(machine, variant, step)
        yield "denoise", step + 1
    for chunk in range(machine.chunks):
        machine.enqueue(variant.decoder, latents=machine.at("images", chunk), frames=machine.at("frames", chunk))
        yield "decode", chunk + 1


def _control(machine: Machine, variant: Variant, step: int) -> None:
    """SparseCtrl at one step, for each prompt."""
    for prompt in range(variant.prompts):
        machine.enqueue(
            f"controlnet_{variant.source}",
            timestep=machine.at("timestep", step),
            prompt_embeds=machine.prompt_embeds(variant, prompt),
            conditioning=machine.at("pictures" if variant.source == "scribble" else "conditioning"),
            conditioning_mask=machine.at("conditioning_mask"),
            frame_index=machine.at("frame_index"),
            **{name: machine.residual(variant, step, prompt, name) for name in machine.residual_names},
        )


def _denoise(machine: Machine, variant: Variant, step: int) -> None:
    """One LCM step: a prediction for each prompt, guidance and the update.

    The noise of a request is its first latents and then what each step but the last adds; after the last step it
    counts nothing, and any will do.
    """
    latents = machine.at("latents", step % 2) if step else machine.at("noise", 0)
    for prompt in range(variant.prompts):
        machine.enqueue(
            "unet",
            latents=latents,
            timestep=machine.at("timestep", step),
            prompt_embeds=machine.prompt_embeds(variant, prompt),
            prediction=machine.at("prediction", prompt),
            **{name: machine.residual(variant, step, prompt, name) for name in machine.residual_names},
        )
    machine.enqueue(
        "lcm_update",
        latents=latents,
        negative=machine.at("prediction", 0),
        positive=machine.at("prediction", variant.prompts - 1),
        guidance_scale=machine.at("guidance_scale"),
        noise=machine.at("noise", (step + 1) % variant.steps),
        coefficients=machine.at("coefficients", step),
        next_latents=machine.at("latents", (step + 1) % 2),
        images=machine.at("images"),
    )
