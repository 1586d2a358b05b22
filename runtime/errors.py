"""The errors that a user can meet, each with a message of one line."""


class SparseCtrlLcmError(Exception):
    """Base of the errors of this package."""


class InvalidRequest(SparseCtrlLcmError, ValueError):
    """A value of the request is not allowed; the message names the field, the value and what is allowed."""


class BundleError(SparseCtrlLcmError, ValueError):
    """A bundle is missing, damaged, or of another version."""


class OutputError(SparseCtrlLcmError, OSError):
    """The clip cannot be written where it was asked for."""


class BackendError(SparseCtrlLcmError, RuntimeError):
    """A backend cannot run here, or failed while it ran."""


class Cancelled(SparseCtrlLcmError):
    """The caller's `on_progress` asked to stop."""
