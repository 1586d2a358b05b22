"""Runs requests on the device: copies inputs in, replays CUDA graphs, copies frames out."""

import weakref
from collections import OrderedDict
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import replace
from typing import Literal

from ..checked_request import CheckedRequest
from ..cpu.sessions import Array
from ..errors import BackendError, DeviceLost, DeviceOutOfMemory, InvalidRequest
from ..format.bundle import Bundle
from ..format.clip_layout import ClipSize, engine_layout
from ..format.decoders import DECODERS
from ..format.weights import changed_graphs, changed_weights, check_same_graphs
from ..loop.conditioning import cache_key
from ..loop.tokenizer import ClipTokenizer, TokenizedPrompt
from ..loop.windows import parts_of
from ..progress import OnFrames, OnPreview, OnProgress, Stages
from .cuda import Cuda
from .device_graph import DeviceGraph
from .engine_interface import Loader
from .program import Variant
from .request_run import RequestRun
from .windows_run import WindowsRun, window_runs
from .workspace import Workspace

MAX_SIZES = 2
"""Clip sizes whose engines and buffers stay on the device; the least recently used is freed first."""


class GpuExecutor:
    """Runs requests on an NVIDIA GPU.

    Args:
        bundle: the bundle.
        loader: opens the engines of a backend.
        kept_bytes: limit on the residuals of one clip size that stay on the device for later requests.
        cuda: the stream; a fake in tests.
        cuda_graphs: whether requests are captured into CUDA graphs and replayed.

    Attributes:
        replayed: whether the frames of the last request came from a replayed CUDA graph; None if its engines cannot be
            captured, since they may replay graphs of their own.
    """

    def __init__(
        self, bundle: Bundle, loader: Loader, kept_bytes: int, cuda: Cuda | None = None, cuda_graphs: bool = True
    ) -> None:
        self.backend = loader.backend
        self.precision = loader.precision
        self.bundle = bundle
        self.weights = bundle
        self._loader = loader
        self._kept_bytes = kept_bytes
        self._cuda_graphs = cuda_graphs
        self._cuda = cuda or Cuda()
        self._tokenizer = ClipTokenizer(bundle.tokenizer)
        self._workspaces: OrderedDict[ClipSize, Workspace] = OrderedDict()
        self._lost: tuple[str, str, str] | None = None
        self.replayed: bool | None = False
        weakref.finalize(self, _release, self._workspaces, self._cuda)

    def run(
        self,
        request: CheckedRequest,
        on_progress: OnProgress | None,
        on_frames: OnFrames | None = None,
        on_preview: OnPreview | None = None,
    ) -> tuple[Array, dict[str, float]]:
        """Frames uint8 [F, H, W, 3], and seconds per stage. `on_frames` is called once, with all frames.

        Raises:
            InvalidRequest: a prompt takes several chunks of tokens.
            DeviceOutOfMemory: the request does not fit, even after all other sizes were freed. A smaller one may fit.
            DeviceLost: the device is gone; load the pipeline again.
            BackendError: an engine is missing, must not be loaded here, or failed. The next request starts clean.
            Cancelled: the callback returned False. The device has finished the work that it had begun.
        """
        if self._lost is not None:
            raise DeviceLost(*self._lost)  # a new error: the old one keeps its traceback alive
        prompts = self._tokenizer.prompts(request)
        _check_lengths(prompts)
        try:
            frames, timings = self._run(request, prompts, on_progress, on_preview)
        except DeviceLost as error:
            self._lost = (error.field, error.reason, error.remedy)
            raise
        if on_frames is not None:
            on_frames(0, frames)
        return frames, timings

    def refit(self, weights: Bundle | None) -> None:
        """Gives the engines the weights of another bundle of the same architecture; None restores their own.

        Raises:
            BackendError: an open engine was built without refit, or a refit failed. All engines are loaded again, with
                their own weights.
        """
        wanted = weights or self.bundle
        try:
            for workspace in self._workspaces.values():
                for graph in workspace.open_graphs:
                    workspace.refit(graph, self.weights, wanted)
                workspace.graphs.clear()
                workspace.conditioning_area.forget()
        except BaseException:  # only some engines have the new weights: load all again, with their own
            self.close()
            self.weights = self.bundle
            raise
        self.weights = wanted

    def check_refit(self, weights: Bundle) -> None:
        """Raises BackendError if requests of the bundle's default size cannot have the weights of another bundle."""
        check_same_graphs(self.bundle, weights)
        self._loader.check_refit(self.bundle)
        sizes = self.bundle.manifest.sizes
        size = ClipSize(width=sizes.width, height=sizes.height, frames=sizes.frames)
        if self.in_one_piece(size):
            for graph in changed_graphs(self.bundle, weights):
                table = self._loader.weight_table(self.bundle, graph, size)
                changed_weights(table, graph, self.bundle, weights)

    def open_graph(self, graph: str, size: ClipSize) -> DeviceGraph:
        """Opens the engine of one graph, with buffers of its own."""
        return DeviceGraph(self.bundle, self._loader, self._cuda, graph, size)

    def in_one_piece(self, size: ClipSize) -> bool:
        """Whether there are engines for clips of this size."""
        if size in self._workspaces:
            return True
        try:
            self._loader.keyframe_slots(self.bundle, size, 0)
        except BackendError:
            return False
        return True

    def close(self) -> None:
        """Frees all device memory; the next request allocates it again."""
        while self._workspaces:
            self._workspaces.popitem()[1].close()

    def _run(
        self,
        request: CheckedRequest,
        prompts: list[TokenizedPrompt],
        on_progress: OnProgress | None,
        on_preview: OnPreview | None,
    ) -> tuple[Array, dict[str, float]]:
        """Makes a clip. If memory runs out, frees everything kept and tries once more with the least memory."""
        try:
            return self._attempt(request, prompts, on_progress, on_preview, least_memory=False)
        except DeviceOutOfMemory:
            self._cuda.clear_error()
            self.close()
        try:
            return self._attempt(request, prompts, on_progress, on_preview, least_memory=True)
        except DeviceOutOfMemory as error:
            self._cuda.clear_error()
            self.close()
            free, total = self._cuda.memory()
            raise DeviceOutOfMemory(
                "backend",
                f"{request.width}x{request.height}x{request.frames} does not fit into the device's memory "
                f"({free / 1e9:.1f} of {total / 1e9:.1f} GB are free)",
                "take a smaller size or fewer frames",
            ) from error

    def _attempt(
        self,
        request: CheckedRequest,
        prompts: list[TokenizedPrompt],
        on_progress: OnProgress | None,
        on_preview: OnPreview | None,
        *,
        least_memory: bool,
    ) -> tuple[Array, dict[str, float]]:
        """Makes a clip. With `least_memory`, SparseCtrl's residuals are computed step by step and not kept."""
        stages = Stages(self._steps(request), on_progress)
        with stages.timed("total"):
            with stages.stage("load"):
                weighted = any(prompt.weighted for prompt in prompts)
                workspace, variant, key = self._prepare(request, weighted=weighted, least_memory=least_memory)
                if on_preview is not None:
                    variant = self._with_previews(workspace, variant)
                stages.report("load", 1)
            kind = RequestRun if request.context_length is None else WindowsRun
            run = kind(workspace, self._cuda, request, variant, stages, on_preview)
            frames = run.frames(self._tokenizer, prompts)
            self.replayed = run.replayed if workspace.capturable else None
            if run.conditioning_is_whole and variant.computes_conditioning and not variant.stepwise:
                workspace.conditioning_area.hold(key, workspace.conditioning_bytes(variant))
        return frames, stages.timings

    def _prepare(
        self, request: CheckedRequest, *, weighted: bool, least_memory: bool
    ) -> tuple[Workspace, Variant, Hashable]:
        """The workspace of a request, its variant, and the key of its conditioning (None without keyframes)."""
        workspace = self._workspace(request)
        runs, controlled = window_runs(request)
        variant = Variant(runs, len(request.texts), "none", request.decoder_graph, weighted=weighted)
        if not request.keyframes:
            return workspace, variant, None
        variant = replace(variant, controlled_steps=controlled)
        key = cache_key(request)
        if workspace.conditioning_area.recall(key):
            return workspace, replace(variant, source="kept"), key
        source: Literal["scribble", "rgb"] = "rgb" if request.controlnet == "rgb" else "scribble"
        self._load(workspace, f"controlnet_{source}")
        if source == "rgb":
            self._load(workspace, "vae_encoder")
        variant = replace(variant, source=source)
        if least_memory or workspace.conditioning_bytes(variant) > self._kept_bytes:
            variant = replace(variant, stepwise=True)
        workspace.conditioning_area.reserve(workspace.conditioning_bytes(variant))
        return workspace, variant, key

    def _with_previews(self, workspace: Workspace, variant: Variant) -> Variant:
        """The variant with previews, which the tiny decoder makes if the bundle has it."""
        workspace.previews.reserve()
        if DECODERS["tiny"] not in self.bundle.manifest.graphs:
            return replace(variant, preview="latents")
        self._load(workspace, DECODERS["tiny"])
        return replace(variant, preview="tiny")

    def _steps(self, request: CheckedRequest) -> dict[str, int]:
        """Units of work of each stage."""
        runs, controlled = window_runs(request)
        keyframes = {"keyframes": 1, "control": len(controlled)} if request.keyframes else {}
        decoded = engine_layout(self.bundle.manifest, request.window_size).decoded_by(request.decoder_graph)
        decoder_runs = len(parts_of(request.frames, decoded))
        return {"load": 1, "text": 1, **keyframes, "denoise": runs, "decode": decoder_runs}

    def _workspace(self, request: CheckedRequest) -> Workspace:
        """The workspace of the size of the request's windows, with its decoder open."""
        size, keyframes = request.window_size, request.keyframes_at_a_time
        if size in self._workspaces and not self._workspaces[size].open_graphs:  # closed after a failure
            del self._workspaces[size]
        if size not in self._workspaces or keyframes > self._workspaces[size].keyframe_slots:
            slots = self._loader.keyframe_slots(self.bundle, size, keyframes)
            if size in self._workspaces:
                self._workspaces.pop(size).close()
            while len(self._workspaces) >= MAX_SIZES:
                self._workspaces.popitem(last=False)[1].close()
            bundle = self.bundle.with_keyframe_slots(slots)
            workspace = Workspace(bundle, self._loader, self._cuda, size, self._kept_bytes, request.decoder_graph)
            workspace.graphs.enabled = self._cuda_graphs
            self._workspaces[size] = workspace
            self._take_weights(workspace, *workspace.open_graphs)
        self._workspaces.move_to_end(size)
        self._load(self._workspaces[size], request.decoder_graph)
        return self._workspaces[size]

    def _load(self, workspace: Workspace, graph: str) -> None:
        if graph not in workspace.open_graphs:
            workspace.load(graph)
            self._take_weights(workspace, graph)

    def _take_weights(self, workspace: Workspace, *graphs: str) -> None:
        """Gives newly loaded engines the weights of the last refit."""
        try:
            for graph in graphs:
                workspace.refit(graph, self.bundle, self.weights)
        except BaseException:
            workspace.close()
            raise


def _check_lengths(prompts: list[TokenizedPrompt]) -> None:
    """Raises InvalidRequest if a prompt takes more tokens than an engine does."""
    chunks = max(len(prompt.input_ids) for prompt in prompts)
    if chunks > 1:
        reason = f"a prompt takes {chunks} chunks of tokens, engines of a GPU take one"
        raise InvalidRequest("long_prompts", reason, "shorten the prompt, or run it on a CPU")


def _release(workspaces: OrderedDict[ClipSize, Workspace], cuda: Cuda) -> None:
    """Frees all device memory when the executor is garbage-collected."""
    while workspaces:
        workspaces.popitem()[1].close()
    with suppress(BackendError):
        cuda.close()
