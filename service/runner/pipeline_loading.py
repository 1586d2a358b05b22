"""Loads the pipeline in the runner's process, and checks its options in the server's process."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ...runtime import BackendError, BundleError, ClipRequest, SparseCtrlLcmError, VideoPipeline
from ...runtime.backends import BACKENDS, choose_backend, find_backend
from ...runtime.format.bundle import Bundle, bundle_folder
from ...runtime.format.clip_layout import ClipSize
from ...runtime.load_options import LoadOptions
from ...runtime.request_checks import check_request
from ..settings import Settings
from .bundle_cache import bundle_manifest, is_url, local_bundle
from .devices import has_own_name, is_cuda, runner_devices, share_cores, take_device, uses_gpu
from .make_runners import check_pool

SHOW_BACKENDS = "run sparsectrl-lcm doctor; engines for it may have to be built"
OWN_NAMES = "serve each bundle under a name of its own: --endpoint OWNER/NAME=BUNDLE"


def load(
    bundle: str | None = None,
    backend: str = "auto",
    precision: str | None = None,
    threads: int | None = None,
    device: str | None = None,
    place: int = 0,
    runners: int = 1,
    warm: Sequence[int] | None = None,
    weights: Mapping[str, str] | None = None,
) -> VideoPipeline:
    """Loads as `VideoPipeline.load` does, on a runner's device and with its share of the cores, and opens all graphs.

    On the CPU one core is left to the server unless `threads` is given: if a clip uses every core, 100 polling clients
    nearly double its time; one free core prevents that (`benchmarks/polling.py`).

    Args:
        bundle: a folder, or the URL of one in an object store, as `local_bundle` takes it.
        backend, precision, threads: as `VideoPipeline.load` takes them.
        device: as `take_device` takes it.
        place, runners: as `share_cores` takes them.
        warm: width and height to warm up for, besides opening all graphs in the bundle's size.
        weights: other bundles, as `bundle` is given, by the names that jobs give.

    Raises:
        BackendError: no backend that runs the bundle uses the device, a graph cannot be opened, or as
            `VideoPipeline.load`.
    """
    bundle, named = local_bundle(bundle), take_device(device)
    if backend == "auto":
        backend = choose_backend(Bundle.load(bundle), LoadOptions(precision=precision, device=named))
    on_gpu = BACKENDS[backend].on_gpu
    if is_cuda(device) and not on_gpu:
        raise BackendError("devices", f"{backend}, which runs this bundle, does not use {device}", SHOW_BACKENDS)
    if not on_gpu and threads is None and named in (None, "CPU"):
        threads = share_cores(place, runners)
    check_weights(backend, weights or ())
    options: dict[str, Any] = {"precision": precision, "device": named, "threads": threads}
    options["weights"] = {name: local_bundle(other) for name, other in (weights or {}).items()}
    pipeline = VideoPipeline.load(bundle, backend, **options)
    open_graphs(pipeline)
    if warm is not None:
        pipeline.warmup(*warm, previews=True)  # the page asks for them
    return pipeline


def check_weights(backend: str, names: Collection[str]) -> None:
    """Checks whether a backend can have other weights for requests that name them.

    Raises:
        BackendError: it has none whose engines can be refitted.
    """
    if names and not _can_refit(backend):
        raise BackendError("weights", f"{backend} cannot change the weights of its engines", OWN_NAMES)


def _can_refit(backend: str) -> bool:
    return "refit" in BACKENDS[backend].build_options


def open_graphs(pipeline: VideoPipeline) -> None:
    """Opens every graph that a request may use, also those of few requests, so that no request is the first to fail.

    A GPU frees each again, so that the device's memory holds only what requests use.

    Raises:
        BackendError: a graph or its engine is damaged or cannot be opened.
    """
    manifest = pipeline.bundle.manifest
    sizes = manifest.sizes
    size = ClipSize(width=sizes.width, height=sizes.height, frames=sizes.frames)
    for graph in manifest.graphs:
        pipeline.executor.open_graph(graph, size).close()


def check_settings(settings: Settings) -> None:
    """Checks the options in the server's process, without the model. The runner's process finds other errors on load.

    Raises:
        InvalidRequest, BackendError, BundleError: an option is wrong.
    """
    LoadOptions(threads=settings.threads)
    check_pool(settings)
    if settings.backend != "auto":
        takes_names = "device" in find_backend(settings.backend, "auto").load_options
        if not takes_names and (named := next(filter(has_own_name, settings.devices), None)):
            raise BackendError("devices", f"{settings.backend} does not use {named}", "give cuda:N, cpu or auto")
    for name, bundle in settings.endpoints.items():
        try:
            manifest = bundle_manifest(bundle)
            if settings.warm is not None:
                check_request(ClipRequest("", width=settings.warm[0], height=settings.warm[1]), manifest)
            _check_weights_of(settings, name)
        except SparseCtrlLcmError as error:
            raise settings.of_endpoint(error, name) from None


def _check_weights_of(settings: Settings, endpoint: str) -> None:
    """Checks what is known of an endpoint's other weights before its bundle is loaded."""
    weights, bundle = settings.weights.get(endpoint, {}), settings.endpoints[endpoint]
    for name, other in weights.items():
        try:
            bundle_manifest(other)
        except BundleError as error:
            raise BundleError("weights", f"{name}: {error.reason}", error.remedy) from None
    if settings.backend != "auto":
        check_weights(settings.backend, weights)
    elif weights and settings.pool == "local":
        if not any(map(uses_gpu, runner_devices(settings.devices, settings.runners))):
            raise BackendError("weights", "they need an NVIDIA GPU, and none is used here", OWN_NAMES)
        able = filter(_can_refit, BACKENDS)
        if not is_url(bundle) and not any(
            BACKENDS[backend].has_engines(bundle_folder(bundle), settings.precision) for backend in able
        ):
            reason = "the bundle has no engines whose weights can be changed"
            raise BackendError("weights", reason, f"run sparsectrl-lcm build with --refit, or {OWN_NAMES}")
