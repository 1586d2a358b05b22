"""The errors that users see: what is at fault, why, and what to do about it."""

from typing import Any


class SparseCtrlLcmError(Exception):
    """Base of the errors of this package. Its message is one line that joins the three attributes.

    Attributes:
        field: what is at fault, by its name in Python: an argument (`num_inference_steps`) or a part (`bundle`,
            `backend`). Empty if no single thing is at fault.
        reason: what is wrong with it.
        remedy: what to do about it. Empty if there is nothing to say.
    """

    def __init__(self, field: str, reason: str, remedy: str = "") -> None:
        super().__init__(message(field, reason, remedy))
        self.field = field
        self.reason = reason
        self.remedy = remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.reason, self.remedy)


def message(field: str, reason: str, remedy: str = "") -> str:
    """Joins the parts of an error to one line. `field` may be another name, such as that of an option."""
    fault = f"{field}: {reason}" if field else reason
    return f"{fault}; {remedy}" if remedy else fault


class InvalidRequest(SparseCtrlLcmError, ValueError):
    """A value of a request or an option is not allowed; the message names it, the value and what is allowed."""


class BundleError(SparseCtrlLcmError, ValueError):
    """A bundle is missing, damaged, or has another version."""


class OutputError(SparseCtrlLcmError, OSError):
    """The clip cannot be written to the given path."""


class BackendError(SparseCtrlLcmError, RuntimeError):
    """A backend cannot run here, or failed while it ran."""


class UnknownBackend(BackendError, InvalidRequest):
    """There is no backend of this name."""


class DeviceOutOfMemory(BackendError):
    """The device has no memory left; retry the request with a smaller size."""


class DeviceLost(BackendError):
    """The device or its context is lost; load the pipeline again, in a new process if that fails too."""


class Cancelled(SparseCtrlLcmError):
    """The caller's `on_progress` asked to stop."""


_SHOWN = 80
"""Characters of a value that an error message shows."""


def shown(value: object) -> str:
    """A value as error messages show it, cut if it is long."""
    try:
        text = repr(value[:_SHOWN] if isinstance(value, str | bytes) else value)
    except ValueError:  # Python does not print integers of more than 4,300 digits
        return "a number of thousands of digits"
    cut = len(text) > _SHOWN or (isinstance(value, str | bytes) and len(value) > _SHOWN)
    return f"{' '.join(text[:_SHOWN].split())}..." if cut else " ".join(text.split())


def first_line(error: BaseException) -> str:
    """The first line of a library's error, or the name of its class if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def reason_of(error: BaseException) -> str:
    """Why the system or a library could not read or write a file, in one line."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
