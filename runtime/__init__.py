"""The runtime: a bundle, a backend and the LCM loop. It never imports torch.

>>> from sparsectrl_lcm.runtime import Keyframe, VideoPipeline
>>> pipeline = VideoPipeline.load()
>>> clip = pipeline.generate("a red circle moves right", keyframes=[Keyframe(0, "circle.png")], seed=42)
>>> clip.save("clip.mp4", fps=8)
"""

from .errors import (
    BackendError,
    BundleError,
    Cancelled,
    DeviceLost,
    DeviceOutOfMemory,
    InvalidRequest,
    OutputError,
    SparseCtrlLcmError,
)
from .many_requests import RequestResult
from .output.clip import Clip
from .pipeline import VideoPipeline
from .progress import Progress
from .request import ClipRequest, Keyframe
from .request_warnings import RequestWarning

__all__ = [
    "BackendError",
    "BundleError",
    "Cancelled",
    "Clip",
    "ClipRequest",
    "DeviceLost",
    "DeviceOutOfMemory",
    "InvalidRequest",
    "Keyframe",
    "OutputError",
    "Progress",
    "RequestResult",
    "RequestWarning",
    "SparseCtrlLcmError",
    "VideoPipeline",
]
