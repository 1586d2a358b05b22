"""The weights of a pipeline: its own, and those of other bundles, which requests name."""

import logging
import os
import time
from collections.abc import Mapping

from .backend_interface import Executor
from .errors import BackendError, BundleError, DeviceLost, InvalidRequest
from .format.bundle import Bundle

_logger = logging.getLogger("sparsectrl_lcm")


class WeightSets:
    """Gives an executor, which has one set of weights at a time, those that each request asks for.

    Args:
        bundle: the pipeline's bundle.
        executor: its executor.
        paths: other bundles by name.

    Attributes:
        named: the bundles whose weights requests may name.

    Raises:
        BundleError: a bundle is missing or damaged.
        BackendError: the engines cannot get the weights of a bundle.
        InvalidRequest: `paths` has no names.
    """

    def __init__(self, bundle: Bundle, executor: Executor, paths: Mapping[str, str | os.PathLike[str]]) -> None:
        self._bundle = self._base = self._fitted = bundle
        self._executor = executor
        if not isinstance(paths, Mapping):
            what = f"{type(paths).__name__} is not allowed"
            raise InvalidRequest("weights", what, 'give bundles by name, such as {"anime": "FOLDER"}')
        self.named: Mapping[str, Bundle] = {name: self._open(name, path) for name, path in paths.items()}

    def bundle_of(self, name: str | None) -> Bundle:
        """The bundle whose weights a request gets."""
        return self._base if name is None else self.named[name]

    def set_base(self, bundle: Bundle | None) -> None:
        """Fits the weights that requests without a name get from now on; None means the pipeline's own.

        Raises:
            BackendError: the engines cannot get them; nothing changes.
        """
        if bundle is not None:
            self._executor.check_refit(bundle)
        wanted = bundle or self._bundle
        self._refit(wanted)
        self._base = wanted

    def fit(self, name: str | None) -> float:
        """Fits the weights of a request, unless the engines have them. Returns the seconds that this took.

        Raises:
            BackendError: the engines cannot get those of another bundle; they have those of the pipeline's.
        """
        wanted = self.bundle_of(name)
        if wanted is self._fitted:
            return 0.0
        start = time.perf_counter()
        try:
            self._refit(wanted)
        except DeviceLost:
            raise
        except BackendError as error:
            if wanted is not self._bundle:
                reason = f"the weights of {wanted.folder.name!r} cannot be used: {error.reason}"
                raise BackendError("refit", reason, error.remedy) from error
            _logger.warning("the engines are loaded again with their own weights: %s", error.reason)
        return time.perf_counter() - start

    def _refit(self, wanted: Bundle) -> None:
        self._fitted = self._bundle  # what an executor has after a refit that failed
        self._executor.refit(None if wanted is self._bundle else wanted)
        self._fitted = wanted

    def _open(self, name: str, path: str | os.PathLike[str]) -> Bundle:
        try:
            bundle = Bundle.load(path)
            self._executor.check_refit(bundle)
        except (BundleError, BackendError) as error:
            raise type(error)("weights", f"{name}: {error.reason}", error.remedy) from None
        return bundle
