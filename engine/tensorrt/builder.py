"""Builds TensorRT and TensorRT-RTX engines of every graph of a bundle, for one clip size."""

import gc
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...runtime.backends import BACKENDS
from ...runtime.errors import BackendError, InvalidRequest, reason_of
from ...runtime.format.build_options import BuildOptions, OnBuildProgress
from ...runtime.format.bundle import Bundle
from ...runtime.format.clip_layout import ClipSize, engine_layout, static_shapes
from ...runtime.format.engine_keys import EngineIndex, EngineRecord, EngineSpec, graph_checksums
from ...runtime.format.weights import WeightTable, weight_table_path
from ...runtime.gpu.device import Device, probe
from ...runtime.gpu.engine_scope import device_scope, version_scope
from ...runtime.gpu.tensorrt_library import RTX, Library, load_library
from ..check import check_precision
from ..engine_writer import SetBuild, engine_record, write_set
from ..quantization.observer import depends_on
from ..rewrites.accumulation import accumulate_in_fp32
from ..rewrites.frames_first import keep_frames_first
from ..rewrites.typed_graph import fuse_for_tensorrt, typed_graph, weight_table, write_typed
from ..rewrites.upsampling import drop_empty_cuts, smallest_with_equal_cuts, transpose_upsampling
from .build_progress import BuildControl, interruptible, make_progress_monitor
from .configuration import compute_capability, configure, strongly_typed
from .fp8 import FP8, Ranges, calibrate, check_fp8, in_fp8, precision_around, to_fp8
from .kernels import kernels_of_log
from .layer_report import kernels_of_plan, summarize
from .timing_cache import TimingCache

_logger = logging.getLogger("sparsectrl_lcm")

MUCH_FP32 = 0.25
"""Part of an engine's products in fp32 that a build warns of. At full size TensorRT-RTX makes it 0.0002 at most."""


def build(
    bundle: Bundle,
    backend: str,
    options: BuildOptions,
    on_progress: OnBuildProgress,
    library: Library | None = None,
    device: Device | None = None,
) -> EngineIndex:
    """Builds the engines of a bundle for one size. See `engine.build`.

    Args:
        bundle: the bundle.
        backend: tensorrt, which needs the GPU that will run the engines, or tensorrt-rtx, which needs none.
        options: what to build; the default precision is fp16.
        on_progress: called with the current step and the fraction of the build that is done, 0 to 1.
        library: TensorRT; None imports it.
        device: the GPU; None searches for it.

    Raises:
        InvalidRequest: an option is not allowed.
        BackendError: the library or the GPU is missing, or a graph cannot be built.
        KeyboardInterrupt: the build was stopped.
    """
    options = replace(options, precision=options.precision or BACKENDS[backend].precisions[0])
    size = options.clip_size(bundle.manifest.sizes)
    _check_options(backend == RTX, options)
    library = library or load_library(backend)
    for capability in options.compute_capabilities:
        compute_capability(library.module, capability)
    device = device or _device(library, options)
    if options.precision == FP8:
        check_fp8(options, device)
    bundle = bundle.with_keyframe_slots(options.keyframe_slots)
    index = EngineIndex(
        backend=backend,
        precision=str(options.precision),
        size=size,
        keyframe_slots=options.keyframe_slots,
        engines={},
    )
    job = _Build(bundle, size, options, library, device)
    made_with = depends_on(bundle) if options.precision == FP8 else {}
    graphs = list(bundle.manifest.graphs)
    return write_set(bundle, SetBuild(index, graphs, job.spec, job.engine, made_with), options, on_progress)


def _check_options(rtx: bool, options: BuildOptions) -> None:
    """Raises InvalidRequest if TensorRT, or TensorRT-RTX, does not have a given option."""
    if not rtx and options.compute_capabilities:
        raise InvalidRequest(
            "compute_capabilities", "only for tensorrt-rtx", "tensorrt builds for the GPU of this machine"
        )
    if options.transposed_upsampling and (options.refit or options.strip_weights):
        raise InvalidRequest(
            "transposed_upsampling", "its weights are not those of the bundle", "leave out refit and strip_weights"
        )
    if rtx and options.hardware_compatibility != "none":
        raise InvalidRequest("hardware_compatibility", "only for tensorrt", "give tensorrt-rtx compute capabilities")
    if rtx and options.version_compatible:
        raise InvalidRequest("version_compatible", "only for tensorrt", "tensorrt-rtx comes without the lean runtime")


def _device(library: Library, options: BuildOptions) -> Device | None:
    """Finds the GPU before anything needs a driver: some versions of TensorRT crash without one.

    TensorRT-RTX also builds without a GPU, for all devices that it supports.
    """
    try:
        return probe()
    except BackendError as error:
        if not library.is_rtx:
            raise
        if options.refit or options.strip_weights:
            raise BackendError("backend", error.reason, "refit and strip_weights need a GPU at the build") from None
        return None


class _Build:
    """Builds the engines of one set, one graph at a time."""

    def __init__(
        self,
        bundle: Bundle,
        size: ClipSize,
        options: BuildOptions,
        library: Library,
        device: Device | None,
    ) -> None:
        self.bundle = bundle
        self.size = size
        self.options = options
        self.library = library
        self.device = device
        self.timing_cache = TimingCache(bundle.folder, library, device)
        self.ranges: dict[str, Ranges] = {}

    def fuse(self, model: ir.Model) -> None:
        """Fuses what TensorRT has operators for, except attention over a single frame: TensorRT-RTX refuses that.

        Engines take one prompt, so that the frames of motion modules may be their first axis.
        """
        if self.options.transposed_upsampling:
            drop_empty_cuts(model, *self.latent_sides)
            transpose_upsampling(model)
        fuse_for_tensorrt(model, temporal=self.size.frames > 1)
        if self.size.frames > 1:
            keep_frames_first(model)

    @property
    def latent_sides(self) -> tuple[int, int]:
        """Height and width of the latents."""
        *_, height, width = engine_layout(self.bundle.manifest, self.size).latent_shape
        return height, width

    def checked_size(self, graph: str) -> ClipSize:
        """A small size that a typed graph takes whose cuts were dropped for the engine's size."""
        model = ir.load(self.bundle.folder / self.bundle.graph(graph).path)
        sizes = self.bundle.manifest.sizes
        height, width = (sizes.vae_scale_factor * smallest_with_equal_cuts(model, side) for side in self.latent_sides)
        return ClipSize(width=width, height=height, frames=min(4, sizes.max_frames))

    def engine(self, graph: str, folder: Path, report: OnBuildProgress) -> EngineRecord:
        """Builds one graph in a folder; returns its record."""
        precision = str(self.options.precision)
        measured: dict[str, Any] = {}
        source = folder / f"{graph}.onnx"
        path = folder / f"{graph}.engine"
        if precision == FP8 and in_fp8(graph) and not self.ranges:
            report("measuring activation ranges on sample requests", 0.0)
            self.ranges = calibrate(self.bundle, folder, self.options.graphs or list(self.bundle.manifest.graphs))
            gc.collect()
        report("reading weights", 0.0)
        table = self.write_source(graph, source)
        gc.collect()  # reference cycles keep the graph's weights mapped: gigabytes
        if self.options.check and precision != "fp32":
            report(f"comparing {precision} with fp32", 0.1)
            size = self.checked_size(graph) if self.options.transposed_upsampling else None
            measured["errors"] = check_precision(self.bundle, graph, precision, source, size)
            gc.collect()
        self.fit_source(source)  # after the comparison, which takes a size of its own
        start = time.perf_counter()
        plan = self.plan(graph, source, list(table.root) if table else [], report)
        measured["seconds"] = round(time.perf_counter() - start, 1)
        path.write_bytes(memoryview(plan))
        beside = []
        if table is not None:
            beside.append(weight_table_path(path))
            beside[0].write_text(table.model_dump_json(), "utf-8")
        measured |= self.layers(graph, plan)
        if not self.options.keep_source:
            source.unlink()
            source.with_suffix(".weights").unlink(missing_ok=True)
        return engine_record(path, self.spec(graph), measured, *beside)

    def layers(self, graph: str, plan: Any) -> dict[str, Any]:
        """Reports the engine's kernels. TensorRT-RTX logged them, so that no GPU has to load the engine.

        The report is empty if it fails, whatever the error is: the engine took minutes to build, and may run.
        """
        rtx = self.library.is_rtx
        try:
            kernels = kernels_of_log(self.library.logger.layers) if rtx else kernels_of_plan(self.library, plan)
            found = summarize(kernels)
            if found.fp16_sums and not self.options.fp16_sums:
                count, longest = len(found.fp16_sums), found.fp16_sums[0]
                _logger.warning("%s: %d kernels add fp16 products in fp16, such as %s", graph, count, longest)
            if self.adds_in_fp32 and found.share("fp32") > MUCH_FP32:
                part = f"{found.share('fp32'):.0%}"
                _logger.warning("%s: %s of the products became fp32, which is slow: try --fp16-sums", graph, part)
            return found.model_dump(mode="json")
        except Exception as error:
            _logger.warning("there is no report of the layers of %r: %s", graph, reason_of(error))
            return {}

    def write_source(self, graph: str, source: Path) -> WeightTable | None:
        """Writes the typed graph for the parser; returns its weights if they have to be refittable."""
        ranges = self.ranges.get(graph, {})
        types = precision_around(str(self.options.precision))
        model = typed_graph(self.bundle, graph, types, self.fuse, low_norms=bool(ranges))
        to_fp8(model, ranges)
        write_typed(model, source)
        refit = self.options.refit or self.options.strip_weights
        return weight_table(self.bundle, graph, model) if refit else None

    @property
    def adds_in_fp32(self) -> bool:
        """Whether fp16 layers ask for fp32 sums, also beside fp8. A weight that can be refitted has no cast."""
        options = self.options
        left = options.fp16_sums or options.refit or options.strip_weights
        return precision_around(str(options.precision)) == "fp16" and not left

    def fit_source(self, source: Path) -> None:
        """Drops from the typed graph what it does not need at this size, and asks for fp32 sums."""
        model = ir.load(source)
        changed = drop_empty_cuts(model, *self.latent_sides)
        if self.adds_in_fp32:
            changed = bool(accumulate_in_fp32(model)) or changed
        if changed:
            ir.save(model, source)  # shares the weights

    def spec(self, graph: str) -> EngineSpec:
        flags = self.options.flags
        shapes = static_shapes(self.bundle.manifest, graph, self.size)
        return EngineSpec(
            graph=graph,
            graph_sha256=graph_checksums(self.bundle.manifest, graph),
            shapes={item.name: shapes[item.name] for item in self.bundle.graph(graph).inputs},
            precision=str(self.options.precision),
            flags=flags,
            backend=self.library.backend,
            version=version_scope(self.library.version, flags),
            device=device_scope(self.library.backend, None if self.library.is_rtx else self.device, flags),
        )

    def plan(self, graph: str, source: Path, names: list[str], report: OnBuildProgress) -> Any:
        """Parses and builds a graph with the named weights refittable; returns the serialized engine."""
        self.library.logger.layers = ""
        # An exception raised while the library calls the logger is lost, so this covers all of its calls.
        with interruptible() as control:
            plan = self._plan(graph, source, names, report, control)
        control.check()
        if plan is None:
            raise self.library.failure(f"cannot build {graph!r}", of_a_build=True)
        return plan

    def _plan(self, graph: str, source: Path, names: list[str], report: OnBuildProgress, control: BuildControl) -> Any:
        trt, logger = self.library.module, self.library.logger
        self.library.forget_errors()
        builder = trt.Builder(logger)
        network = builder.create_network(strongly_typed(trt))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(source)):
            if not parser.num_errors:
                raise self.library.failure(f"cannot parse {graph!r}", of_a_build=True)
            error = parser.get_error(0)
            reason = " ".join(f"{error.node_name()}: {error.desc()}".split())
            raise BackendError("build", f"{self.library.backend} cannot parse {graph!r}: {reason}")
        shapes = static_shapes(self.bundle.manifest, graph, self.size)
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            tensor.shape = shapes[tensor.name]
        for name in names:
            if not network.mark_weights_refittable(name):
                raise self.library.failure(f"cannot make {name!r} of {graph!r} refittable", of_a_build=True)
        config = builder.create_builder_config()
        configure(trt, config, self.library.is_rtx, self.options)
        self.timing_cache.attach(config)
        report_build = lambda text, fraction: report(text, 0.2 + 0.8 * fraction)  # noqa: E731
        config.progress_monitor = make_progress_monitor(trt, report_build, control)
        plan = builder.build_serialized_network(network, config)
        self.timing_cache.detach(config)
        return plan
