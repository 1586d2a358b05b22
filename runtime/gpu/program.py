"""The loop on the device, for every GPU backend: all engine runs of a clip, in order."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal, Protocol

Source = Literal["scribble", "rgb", "none", "kept"]
"""Where the conditioning comes from: a kind of keyframes, no keyframes, or kept from an earlier request."""
Preview = Literal["none", "tiny", "latents"]
"""What each step's preview is made with: the tiny decoder, or the host from latents."""


@dataclass(frozen=True, slots=True)
class Variant:
    """The properties of a request that decide which engines run on which memory. Each variant has its own CUDA graphs.

    Attributes:
        steps: LCM steps.
        prompts: 2 with guidance (the negative prompt first), else 1.
        source: where the conditioning comes from.
        decoder: the graph that makes the frames.
        stepwise: whether SparseCtrl runs before each step, because the residuals of all steps take too much memory.
        weighted: whether the prompt has weights: its embeddings are then computed before, and are inputs.
        controlled_steps: the steps that keyframes guide, counted from 0; the others take zeros as residuals.
        preview: what the caller sees of each step.
    """

    steps: int
    prompts: int
    source: Source
    decoder: str
    stepwise: bool = False
    controlled_steps: range = range(0)
    weighted: bool = False
    preview: Preview = "none"

    @property
    def computes_conditioning(self) -> bool:
        """Whether the request computes the conditioning of its keyframes."""
        return self.source in ("scribble", "rgb")

    @property
    def starts_with_conditioning(self) -> bool:
        """Whether there is any conditioning to compute: prompt embeddings or that of keyframes."""
        return self.computes_conditioning or (self.source == "none" and not self.weighted)


class Machine(Protocol):
    """The engines that a program runs, and the address of each tensor."""

    residual_names: tuple[str, ...]

    def decoder_runs(self, graph: str) -> int:
        """Number of runs of a decoder that make the whole clip."""

    def enqueue(self, graph: str, **addresses: int) -> None:
        """Enqueues a run of a graph's engine."""

    def decode(self, graph: str, part: int) -> None:
        """Enqueues a run of a decoder on one of its `decoder_runs` parts of the frames."""

    def make_preview(self, kind: Preview, step: int) -> None:
        """Enqueues the preview of a step, whose update has been enqueued."""

    def at(self, name: str, index: int = 0) -> int:
        """Address of an input or buffer."""

    def prompt_embeds(self, variant: Variant, prompt: int) -> int:
        """Address of a prompt's embeddings."""

    def residual(self, variant: Variant, step: int, prompt: int, name: str) -> int:
        """Address of a residual; at a step without control, the address of zeros."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a request. The host launches it when it has drawn the noise for it, while the device is still busy.

    Attributes:
        noise: the arrays of noise that have to be on the device before this part, besides those of earlier parts.
        work: enqueues the work; yields stage and step after each unit of it.
    """

    noise: range
    work: Iterator[tuple[str, int]]


def program(machine: Machine, variant: Variant) -> list[Part]:
    """A whole request, in up to three parts: conditioning, the first prediction, and the rest."""
    rest = range(1, variant.steps)
    prediction, loop = _first_prediction(machine, variant), _after_first_prediction(machine, variant)
    parts = [Part(range(1), prediction), Part(rest, loop)] if rest else [Part(range(1), chain(prediction, loop))]
    if variant.starts_with_conditioning:
        parts.insert(0, Part(range(0), _conditioning(machine, variant)))
    assert parts[0].noise == noise_at_start(variant)
    return parts


def noise_at_start(variant: Variant) -> range:
    """The arrays of noise that have to be on the device before a request's first part."""
    return range(0 if variant.starts_with_conditioning else 1)


def _conditioning(machine: Machine, variant: Variant) -> Iterator[tuple[str, int]]:
    """Prompt embeddings and SparseCtrl's residuals."""
    if not variant.weighted:
        for prompt in range(variant.prompts):
            encode_text(machine, prompt, machine.prompt_embeds(variant, prompt))
        yield "text", 1
    if variant.source == "rgb":
        machine.enqueue("vae_encoder", image=machine.at("pictures"), latents=machine.at("conditioning"))
    if variant.computes_conditioning:
        yield "keyframes", 1
        if not variant.stepwise:
            for done, step in enumerate(variant.controlled_steps, start=1):
                control(machine, variant, step, step)
                yield "control", done


def encode_text(machine: Machine, prompt: int, prompt_embeds: int) -> None:
    """Runs the text encoder on a prompt; writes the embeddings to an address."""
    machine.enqueue(
        "text_encoder",
        input_ids=machine.at("input_ids", prompt),
        attention_mask=machine.at("attention_mask"),
        clip_skip=machine.at("clip_skip", prompt),
        prompt_embeds=prompt_embeds,
    )


def _first_prediction(machine: Machine, variant: Variant) -> Iterator[tuple[str, int]]:
    """The predictions of the first step, which need only the initial latents. Its unit ends with the update."""
    _predict(machine, variant, 0)
    yield from ()


def _after_first_prediction(machine: Machine, variant: Variant) -> Iterator[tuple[str, int]]:
    """The first update, all other steps, and the decoder."""
    for step in range(variant.steps):
        if step:
            _predict(machine, variant, step)
        _update(machine, variant, step)
        yield "denoise", step + 1
        if variant.preview != "none":
            machine.make_preview(variant.preview, step)
            yield "previews", step + 1
    for run in range(machine.decoder_runs(variant.decoder)):
        machine.decode(variant.decoder, run)
        yield "decode", run + 1


def control(machine: Machine, variant: Variant, step: int, run: int) -> None:
    """Runs SparseCtrl at one step, for each prompt.

    Args:
        machine: runs the engines.
        variant: of the request.
        step: the step whose timestep it takes.
        run: number of the run whose residuals it writes: the step, or one of its windows.
    """
    for prompt in range(variant.prompts):
        machine.enqueue(
            f"controlnet_{variant.source}",
            timestep=machine.at("timestep", step),
            prompt_embeds=machine.prompt_embeds(variant, prompt),
            conditioning=machine.at("pictures" if variant.source == "scribble" else "conditioning"),
            conditioning_mask=machine.at("conditioning_mask"),
            frame_index=machine.at("frame_index"),
            **{name: machine.residual(variant, run, prompt, name) for name in machine.residual_names},
        )


def _predict(machine: Machine, variant: Variant, step: int) -> None:
    """The UNet's prediction at one step, for each prompt; if residuals are not kept, SparseCtrl runs before it."""
    if variant.stepwise and step in variant.controlled_steps:
        control(machine, variant, step, step)
    predict(machine, variant, step, step, _latents(machine, step))


def predict(machine: Machine, variant: Variant, step: int, run: int, latents: int) -> None:
    """Runs the UNet at one step, for each prompt; the arguments are those of `control`, and the latents' address."""
    for prompt in range(variant.prompts):
        machine.enqueue(
            "unet",
            latents=latents,
            timestep=machine.at("timestep", step),
            prompt_embeds=machine.prompt_embeds(variant, prompt),
            conditioning_scale=machine.at("conditioning_scale"),
            prediction=machine.at("prediction", prompt),
            **{name: machine.residual(variant, run, prompt, name) for name in machine.residual_names},
        )


def _update(machine: Machine, variant: Variant, step: int) -> None:
    """Guidance and the LCM update.

    Noise 0 is the initial latents; the update of a step adds noise `step + 1`. The last step adds none: its result
    `images` does not depend on the noise, so it gets noise 0 again.
    """
    machine.enqueue(
        "lcm_update",
        latents=_latents(machine, step),
        negative=machine.at("prediction", 0),
        positive=machine.at("prediction", variant.prompts - 1),
        guidance_scale=machine.at("guidance_scale"),
        noise=machine.at("noise", (step + 1) % variant.steps),
        coefficients=machine.at("coefficients", step),
        next_latents=machine.at("latents", (step + 1) % 2),
        images=machine.at("images"),
    )


def _latents(machine: Machine, step: int) -> int:
    """The latents that a step begins with."""
    return machine.at("latents", step % 2) if step else machine.at("noise", 0)
