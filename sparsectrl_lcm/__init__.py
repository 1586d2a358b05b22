"""AnimateDiff + SparseCtrl + LCM: keyframes and a prompt in, a 16-frame clip out.

>>> from sparsectrl_lcm import Keyframe, VideoPipeline
>>> pipeline = VideoPipeline.load()
>>> clip = pipeline.generate("a red circle moves right", keyframes=[Keyframe(0, "circle.png")], seed=42)
>>> clip.save("clip.mp4", fps=8)
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .runtime import Keyframe as Keyframe
    from .runtime import VideoPipeline as VideoPipeline

__version__ = "0.1.0"
__all__ = ["Keyframe", "VideoPipeline", "__version__"]

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read by ONNX Runtime when it is imported

_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "runtime" / "pipeline.py").is_file():  # in a checkout, the other folders are beside this one
    __path__.append(str(_CHECKOUT))


def __getattr__(name: str) -> Any:
    """Loads the runtime when one of its names is first used."""
    if name not in ("Keyframe", "VideoPipeline"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import runtime

    return getattr(runtime, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
