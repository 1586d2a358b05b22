"""The engines, buffers and CUDA graphs that requests of one clip size share on the device."""

from math import prod
from typing import Any

from ..errors import BackendError
from ..format.bundle import Bundle
from ..format.clip_layout import ClipSize, engine_layout
from ..format.decoders import DECODERS
from ..format.weights import changed_weights, check_files
from ..loop.conditioning import residual_inputs
from ..request import MAX_STEPS
from .buffers import Block, Inputs, Tensor, aligned, host_array
from .captures import Between, GraphCache
from .conditioning_area import ConditioningArea
from .cuda import Cuda
from .engine_interface import Engine, Loader
from .preview_area import PreviewArea
from .program import Preview, Variant, program

MAX_PROMPTS = 2
GIVEN_EMBEDS = "given_embeds"
"""The input that holds the embeddings of prompts with weights."""

_NAN = 0xFF
"""Each byte of a float16, bfloat16 or float32 that is not a number."""
_LARGE = 0x5A
"""Each byte of a large float16, bfloat16 or float32. Engines may multiply activations that they never wrote by zero."""


class Workspace:
    """Allocates all device memory once. Only the conditioning area grows, for requests with more steps.

    Implements `Machine` for the program. Opens the decoder graph `decoder`; `load` opens others.
    """

    def __init__(
        self, bundle: Bundle, loader: Loader, cuda: Cuda, size: ClipSize, kept_bytes: int, decoder: str
    ) -> None:
        self.bundle = bundle
        self.size = size
        self.residual_names = tuple(residual_inputs(bundle.manifest))
        self.layout = engine_layout(bundle.manifest, size)
        self.decoder_runs = self.layout.decoder_runs
        self._frames_shape = (size.frames, size.height, size.width, 3)
        self._loader = loader
        self._cuda = cuda
        self._engines: dict[str, Engine] = {}
        self._activation = Block()
        self._buffers = Block()
        self._inputs: Inputs | None = None
        self._frames = 0
        self._events: list[Any] = []
        self.units: dict[Variant, list[tuple[str, int]]] = {}
        self.graphs = GraphCache(cuda)
        self.conditioning_area = ConditioningArea(cuda, kept_bytes, self.graphs.clear)
        self.previews = PreviewArea(self, cuda)
        try:
            for graph in ("unet", decoder, "text_encoder", "lcm_update"):
                self.load(graph)
            self._allocate()
        except BaseException:
            self.close()
            raise

    def load(self, graph: str) -> None:
        """Opens the engine of a graph, if it is not open yet."""
        if graph in self._engines:
            return
        shapes = self.shapes(graph)
        engine = self._loader.open(self.bundle, graph, self.size, shapes, self._cuda)
        self._engines[graph] = engine
        try:
            self._check_types(graph, engine)
            self._share_activation(engine)
        except BaseException:  # engines may be without activation memory
            self.close()
            raise

    def shapes(self, graph: str) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs and outputs of a graph's engine."""
        return self.layout.shapes(graph, self.bundle.graph(graph))

    def _check_types(self, graph: str, engine: Engine) -> None:
        """Raises BackendError if the types of an engine's inputs and outputs differ from those of the buffers."""
        record = self.bundle.graph(graph)
        for item in (*record.inputs, *record.outputs):
            free = item.name == "prompt_embeds" or "residual" in item.name
            allowed = ("float32", "float16", "bfloat16") if free else (item.dtype,)
            if engine.dtypes.get(item.name) not in allowed:
                raise BackendError(
                    "backend",
                    f"{item.name!r} of the engine of {graph!r} is {engine.dtypes.get(item.name)}, not {allowed[0]}",
                    "build the engines again",
                )

    def _share_activation(self, engine: Engine) -> None:
        """Gives an engine the activation memory, which all engines share; grows it to the need of the largest."""
        users = [engine]
        if engine.activation_bytes > self._activation.nbytes:
            self.graphs.clear()
            if self._activation.nbytes:
                self._cuda.free(self._activation.address)
            self._activation = Block()
            self._activation.address = self._cuda.allocate(aligned(engine.activation_bytes))
            self._activation.nbytes = aligned(engine.activation_bytes)
            users = list(self._engines.values())
        for user in users:
            user.use_activation(self._activation.address, self._activation.nbytes)

    def conditioning_bytes(self, variant: Variant) -> int:
        """Bytes of the prompt embeddings and residuals in the conditioning area."""
        slots = 1 if variant.stepwise else len(variant.controlled_steps)
        return variant.prompts * (self._embeds.stride + slots * self._residuals.nbytes)

    @property
    def keyframe_slots(self) -> int:
        """Keyframes that the engines take."""
        return self.bundle.manifest.keyframe_slots

    @property
    def inputs(self) -> Inputs:
        """The page-locked memory for a request's inputs."""
        assert self._inputs is not None
        return self._inputs

    def frames(self) -> Any:
        """The frames of the last request in page-locked memory, uint8 [F, H, W, 3]."""
        return host_array(self._frames, self._frames_shape, "uint8")

    def enqueue_all(self, variant: Variant, between: Between) -> None:
        """Enqueues a whole request, with an event after each unit of work."""
        self._cuda.record(self.event(0))
        units: list[tuple[str, int]] = []
        for index, part in enumerate(program(self, variant)):
            if index:
                between(part.noise)
            for unit in part.work:
                units.append(unit)
                self._cuda.record(self.event(len(units)))
        self.units[variant] = units

    def scrub(self, variant: Variant) -> None:
        """Overwrites all that a request computes, so that work that a graph leaves out cannot go unnoticed."""
        buffers = self._buffers
        start = buffers.tensors["prompt_embeds"].offset
        self._cuda.fill(buffers.address + start, _NAN, buffers.nbytes - start)
        if variant.source == "rgb":  # all but the blank picture's latents, which stay zero
            self._cuda.fill(buffers.at("conditioning"), _NAN, 4 * prod(self.shapes("vae_encoder")["latents"]))
        if variant.computes_conditioning:
            self._cuda.fill(self.conditioning_area.address, _NAN, self.conditioning_bytes(variant))
        if self._activation.nbytes:
            self._cuda.fill(self._activation.address, _LARGE, self._activation.nbytes)

    def copy_frames_out(self) -> None:
        """Copies the frames to the host, once per request."""
        self._cuda.copy_out(self._frames, self._buffers.at("frames"), self.frames().nbytes)

    def event(self, index: int) -> Any:
        """The event after unit `index` of a request; 0 is its start."""
        while len(self._events) <= index:
            self._events.append(self._cuda.event())
        return self._events[index]

    def refit(self, graph: str, current: Bundle, wanted: Bundle) -> None:
        """Replaces an open engine's weights from `current` with those of `wanted`."""
        if current is wanted:
            return
        table = self._loader.weight_table(self.bundle, graph, self.size)
        if names := changed_weights(table, graph, current, wanted):
            check_files(wanted, {table.root[name].path for name in names})
            self._engines[graph].refit(names, lambda name: table.read(wanted, name))

    @property
    def capturable(self) -> bool:
        """Whether the runs of all engines can be captured into the loop's CUDA graph."""
        return all(engine.capturable for engine in self._engines.values())

    @property
    def open_graphs(self) -> tuple[str, ...]:
        """The graphs whose engines are open."""
        return tuple(self._engines)

    def close(self) -> None:
        """Frees everything, even if the device no longer answers."""
        steps = [self._cuda.synchronize, self.graphs.clear, self.conditioning_area.close, self.previews.close]
        steps += [engine.close for engine in self._engines.values()]
        if self._inputs is not None:
            steps.append(self._inputs.close)
        for block in (self._buffers, self._activation):
            if block.address:
                steps.append(lambda address=block.address: self._cuda.free(address))  # type: ignore[misc]
        if self._frames:
            steps.append(lambda: self._cuda.free_host(self._frames))
        steps += [lambda event=event: self._cuda.free_event(event) for event in self._events]  # type: ignore[misc]
        for step in steps:
            try:
                step()
            except BackendError:
                continue
        self._engines, self._events, self._inputs, self._frames = {}, [], None, 0
        self._buffers, self._activation = Block(), Block()

    # Machine

    def enqueue(self, graph: str, **addresses: int) -> None:
        """Enqueues a run of a graph's engine."""
        self._engines[graph].enqueue(addresses)

    def decode(self, graph: str, part: int) -> None:
        """Enqueues a run of a decoder on one part of the frames.

        An engine takes aligned addresses only. Parts of clips with odd sides may begin elsewhere: these are copied.
        """
        latents, frames = self._part_bytes(graph)
        source, target = self.at("images") + part * latents, self.at("frames") + part * frames
        if not self._copies_parts(graph):
            self.enqueue(graph, latents=source, frames=target)
            return
        self._cuda.copy(self.at("part_latents"), source, latents)
        self.enqueue(graph, latents=self.at("part_latents"), frames=self.at("part_frames"))
        self._cuda.copy(target, self.at("part_frames"), frames)

    def make_preview(self, kind: Preview, step: int) -> None:
        """Enqueues the preview of a step."""
        self.previews.enqueue(kind, step)

    def _part_bytes(self, decoder: str) -> tuple[int, int]:
        """Bytes of the latents and of the frames that a decoder takes and makes at a time."""
        tensors, runs = self._buffers.tensors, self.decoder_runs(decoder)
        return tensors["images"].nbytes // runs, tensors["frames"].nbytes // runs

    def _copies_parts(self, decoder: str) -> bool:
        """Whether a decoder's parts of the frames begin at addresses that engines do not take."""
        return self.decoder_runs(decoder) > 1 and any(nbytes != aligned(nbytes) for nbytes in self._part_bytes(decoder))

    def at(self, name: str, index: int = 0) -> int:
        """Address of an input or buffer."""
        if name in self.inputs.block.tensors:
            return self.inputs.at(name, index)
        return self._buffers.at(name, index)

    def prompt_embeds(self, variant: Variant, prompt: int) -> int:
        """Address of a prompt's embeddings."""
        if variant.weighted:
            return self.inputs.at(GIVEN_EMBEDS, prompt)
        if variant.source == "none":
            return self._buffers.at("prompt_embeds", prompt)
        return self.conditioning_area.address + prompt * self._embeds.stride

    def residual(self, variant: Variant, step: int, prompt: int, name: str) -> int:
        """Address of a residual; at a step without control, the address of zeros."""
        if step not in variant.controlled_steps:
            return self._buffers.at("zeros")
        slot = 0 if variant.stepwise else step - variant.controlled_steps.start
        base = variant.prompts * self._embeds.stride
        place = (slot * variant.prompts + prompt) * self._residuals.nbytes
        return self.conditioning_area.address + base + place + self._residuals.tensors[name].offset

    def _allocate(self) -> None:
        manifest, cuda = self.bundle.manifest, self._cuda
        unet = self.shapes("unet")
        dtypes = self._engines["unet"].dtypes
        self._embeds = Tensor(0, unet["prompt_embeds"], dtypes["prompt_embeds"])
        self._residuals = Block()
        for name in self.residual_names:
            self._residuals.add(name, unet[name], dtypes[name])
        decoder = self.shapes(DECODERS["full"])

        buffers = self._buffers
        buffers.add("zeros", (max(tensor.nbytes for tensor in self._residuals.tensors.values()),), "uint8")
        if "rgb" in manifest.controlnets:
            buffers.add("conditioning", self.shapes("controlnet_rgb")["conditioning"], "float32")
        buffers.add("prompt_embeds", self._embeds.shape, self._embeds.dtype, MAX_PROMPTS)
        buffers.add("latents", unet["latents"], "float32", 2)
        buffers.add("prediction", unet["prediction"], "float32", MAX_PROMPTS)
        buffers.add("images", (self.size.frames, *decoder["latents"][1:]), "float32")
        buffers.add("frames", self._frames_shape, "uint8")
        if any(map(self._copies_parts, DECODERS.values())):
            buffers.add("part_latents", decoder["latents"], "float32")
            buffers.add("part_frames", decoder["frames"], "uint8")
        buffers.address = cuda.allocate(buffers.nbytes)
        cuda.fill(buffers.address, 0, buffers.nbytes)

        slots = self.keyframe_slots + 1
        block = Block()
        block.add(GIVEN_EMBEDS, self._embeds.shape, self._embeds.dtype, MAX_PROMPTS)
        block.add("pictures", (slots, self.size.height, self.size.width, 3), "uint8")
        block.add("conditioning_mask", (slots,), "float32")
        block.add("frame_index", (self.size.frames,), "int64")
        block.add("input_ids", (1, manifest.max_tokens), "int64", MAX_PROMPTS)
        block.add("attention_mask", (1, manifest.max_tokens), "int64")
        block.add("clip_skip", (1,), "int64", MAX_PROMPTS)
        block.add("guidance_scale", (1,), "float32")
        block.add("conditioning_scale", (1,), "float32")
        block.add("timestep", (1,), "float32", MAX_STEPS)
        block.add("coefficients", (6,), "float32", MAX_STEPS)
        block.add("noise", unet["latents"], "float32", MAX_STEPS)
        self._inputs = Inputs(cuda, block)
        self._frames = cuda.allocate_host(prod(self._frames_shape))
