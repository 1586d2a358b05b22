"""Which errors of the system mean that a disk is full."""

import errno


def is_disk_full(error: BaseException | None) -> bool:
    """Returns whether this error, or one that caused it, is that of a full disk or quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False
