"""Options of a build in TensorRT's own configuration."""

from typing import Any

from ...runtime.errors import InvalidRequest
from ...runtime.format.build_options import BuildOptions
from ...runtime.gpu.tensorrt_library import compute_capabilities


def configure(trt: Any, config: Any, rtx: bool, options: BuildOptions) -> None:
    """Sets the options in TensorRT's builder configuration."""
    config.builder_optimization_level = options.optimization_level
    config.max_aux_streams = options.aux_streams
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layer names, for `inspect`
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.workspace * 2**30))
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.refit or options.strip_weights:
        config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)  # only the marked weights; constants may be folded
    if options.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if rtx:
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # so that a run can be captured
        capabilities = options.sorted_capabilities
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(compute_capability(trt, capability), index)
    else:
        levels = trt.HardwareCompatibilityLevel
        config.hardware_compatibility_level = {
            "none": levels.NONE,
            "same-compute-capability": levels.SAME_COMPUTE_CAPABILITY,
            "ampere-plus": levels.AMPERE_PLUS,
        }[options.hardware_compatibility]


def strongly_typed(trt: Any) -> int:
    """The flag of a network that keeps the types of the graph; TensorRT 11 has no other kind."""
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def compute_capability(trt: Any, text: str) -> Any:
    """Returns ComputeCapability.SM89 for 8.9.

    Raises:
        InvalidRequest: TensorRT-RTX does not support it.
    """
    known = compute_capabilities(trt)
    if text not in known:
        allowed = ", ".join(sorted(known, key=float))
        raise InvalidRequest("compute_capabilities", f"{text!r} is not supported", f"allowed are {allowed}")
    return known[text]
