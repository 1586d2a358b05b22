"""A bundle that is open on a backend: makes the clips of requests, one at a time."""

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from .output.clip import Clip
from .progress import OnFrames, OnPreview, OnProgress
from .request import ClipRequest

if TYPE_CHECKING:  # imported when a bundle is loaded: `import sparsectrl_lcm` stays quick
    from .backend_interface import Executor
    from .checked_request import CheckedRequest
    from .format.bundle import Bundle
    from .loop.noise import NoiseSource


class OpenPipeline:
    """A bundle on one backend. Threads may share it; their requests take turns.

    In a `with` statement it is closed at the end of the block.
    """

    def __init__(self, bundle: "Bundle", executor: "Executor", weights: Mapping[str, str | os.PathLike[str]]) -> None:
        from .weight_sets import WeightSets

        self.bundle = bundle
        self.executor = executor
        self._weights = WeightSets(bundle, executor, weights)
        self._lock = threading.Lock()
        self._warned: set[str] = set()

    @property
    def backend(self) -> str:
        """The name of the backend that runs the requests."""
        return self.executor.backend

    @property
    def precision(self) -> str | None:
        """The precision of its engines, such as fp32, bf16 or int8; None if each size has its own engines."""
        return self.executor.precision

    @property
    def width(self) -> int:
        """Pixels of a clip if a request names no width."""
        return self.bundle.manifest.sizes.width

    @property
    def height(self) -> int:
        """Pixels of a clip if a request names no height."""
        return self.bundle.manifest.sizes.height

    @property
    def num_frames(self) -> int:
        """Frames of a clip if a request names no number."""
        return self.bundle.manifest.sizes.frames

    @property
    def weights(self) -> "Mapping[str, Bundle]":
        """The other bundles whose weights requests may name."""
        return self._weights.named

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def warmup(
        self,
        width: int | None = None,
        height: int | None = None,
        num_frames: int | None = None,
        *,
        previews: bool = False,
    ) -> None:
        """Does what the first request of a size would do besides its clip: loads, compiles and captures graphs.

        On a CPU this opens the graphs for requests with three keyframes (fewer in short clips) and the full decoder.
        On a GPU it makes clips.

        Args:
            width, height, num_frames: as for `generate`.
            previews: whether requests with `on_preview` will come, too.

        Raises:
            InvalidRequest: a size is not allowed.
            BackendError: a graph cannot be opened, or the backend failed.
        """
        from .warmup import warm_up

        checked = self._checked(ClipRequest("", width=width, height=height, num_frames=num_frames))
        with self._lock:
            warm_up(self.bundle, self.executor, checked.clip_size, previews)

    def run(
        self,
        request: "ClipRequest | CheckedRequest",
        on_progress: OnProgress | None = None,
        on_frames: OnFrames | None = None,
        on_preview: OnPreview | None = None,
        *,
        noise: "Callable[[], NoiseSource] | None" = None,
    ) -> Clip:
        """Makes the clip of a request: like `generate`, with the arguments in one object.

        Args:
            request: what to make; may come from `check`.
            on_progress, on_frames, on_preview: as for `generate`.
            noise: returns what draws the noise instead of torch's generator with the seed: an object with a method
                `randn(shape, out=None)`. It is called again if the request is made again.

        Raises:
            InvalidRequest, Cancelled, BackendError: as `generate` does.
        """
        from .checked_request import CheckedRequest

        checked = request if isinstance(request, CheckedRequest) else self.check(request)
        if noise is not None:
            checked = replace(checked, noise=noise)
        return self._make(checked, on_progress, on_frames, on_preview)

    def refit(self, bundle: str | os.PathLike[str] | None) -> None:
        """Gives the engines another motion module or other LoRAs, without a build; requests that name none get these.

        Args:
            bundle: a bundle of the same architecture, exported with the other weights; None restores the pipeline's own
                weights, bit for bit.

        Raises:
            BundleError: the bundle is missing or damaged.
            BackendError: the architectures, tokenizers or schedules differ, or the engines were built without refit.
        """
        from .format.bundle import Bundle

        weights = None if bundle is None else Bundle.load(bundle)
        with self._lock:
            self._weights.set_base(weights)

    def close(self) -> None:
        """Frees the graphs and kept conditionings; the next request opens the graphs again."""
        with self._lock:
            self.executor.close()

    def check(self, request: ClipRequest) -> "CheckedRequest":
        """Reads the keyframes of a request and fills in its defaults, also a random seed.

        Warns if the model was not trained for such a request. In the log, the size, the frames, the keyframes and the
        words have one warning each in the pipeline's life. A receiver, such as `on_warning` of `generate_many`, gets a
        warning for every such request instead.

        Raises:
            InvalidRequest: a value is not allowed.
        """
        from .training_limits import warn_if_untrained

        checked = self._checked(request)
        warn_if_untrained(checked, self._weights.bundle_of(checked.weights).manifest.trained_for, self._warned)
        return checked

    def metadata(self, request: "CheckedRequest") -> dict[str, Any]:
        """`Clip.metadata` of a request before its clip is made, for `Recording`."""
        from .output.metadata import describe

        return describe(request, self._weights.bundle_of(request.weights), self.executor)

    def _checked(self, request: ClipRequest) -> "CheckedRequest":
        from .request_checks import check_request

        return check_request(request, self.bundle.manifest, self.executor.in_one_piece, tuple(self.weights))

    def _make(
        self,
        checked: "CheckedRequest",
        on_progress: OnProgress | None,
        on_frames: OnFrames | None = None,
        on_preview: OnPreview | None = None,
    ) -> Clip:
        with self._lock:
            refit_seconds = self._weights.fit(checked.weights)
            frames, timings = self.executor.run(checked, on_progress, on_frames, on_preview)
            metadata = self.metadata(checked)  # before a `refit` that waits for its turn
        if refit_seconds:
            timings = {"refit": refit_seconds, **timings, "total": refit_seconds + timings["total"]}
        return Clip(frames, checked.seed, timings, checked.keyframes, metadata)
