"""OpenVINO's Python package."""

import sys
from typing import Any

_REPORTS = "openvino_telemetry"


def load_openvino() -> Any:
    """Imports OpenVINO without its reports of use to its maker, which write files into the user's home, too.

    Raises:
        ImportError: it is not installed.
    """
    if "openvino" not in sys.modules and _REPORTS not in sys.modules:
        sys.modules[_REPORTS] = None  # type: ignore[assignment]  # as if it were not installed
        try:
            import openvino
        finally:
            sys.modules.pop(_REPORTS, None)
    import openvino

    return openvino
