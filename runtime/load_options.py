"""Options that set how a backend runs a bundle."""

from dataclasses import dataclass
from numbers import Integral

from .errors import InvalidRequest, shown

KEPT_BYTES = 2 * 1024**3
"""Default limit in bytes on the conditionings that are kept for later requests."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Options that set how a backend runs a bundle.

    Attributes:
        precision: precision of the engines; None takes the first that was built, in the backend's order.
        device: OpenVINO's name of a device; None takes the CPU.
        threads: threads of a backend that computes on the CPU; None takes one per core.
        kept_bytes: memory in bytes for conditionings that later requests use again.
        cuda_graphs: whether a GPU backend captures its work into CUDA graphs and replays them. False is slower; use
            it for measurements and to find faults.

    Raises:
        InvalidRequest: `threads` or `kept_bytes` is not allowed.
    """

    precision: str | None = None
    device: str | None = None
    threads: int | None = None
    kept_bytes: int = KEPT_BYTES
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.cuda_graphs, bool):
            raise InvalidRequest("cuda_graphs", f"{shown(self.cuda_graphs)} is not allowed", "give True or False")
        for name, value, low in (("threads", self.threads, 1), ("kept_bytes", self.kept_bytes, 0)):
            if name == "threads" and value is None:
                continue
            if not isinstance(value, Integral) or isinstance(value, bool) or value < low:
                raise InvalidRequest(name, f"{shown(value)} is not allowed", f"give a whole number from {low} on")
