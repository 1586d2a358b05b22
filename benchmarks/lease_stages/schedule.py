"""The stages of lease.py in their order, and the packages that they need."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage.

    Attributes:
        name: its name.
        seconds: its longest time.
        module: the module with `measure(settings, write)`.
        decisive: a field of its rows; if the stage ends without it, nothing else is worth running.
    """

    name: str
    seconds: float
    module: str
    decisive: str = ""


STAGES = (
    Stage("device", 150, "lease_stages.device", decisive="device"),
    Stage("tests", 210, "lease_stages.device_tests"),
    Stage("events", 60, "lease_stages.events"),
    Stage("weights", 60, "lease_stages.weights"),
    Stage("request", 180, "lease_stages.requests"),
    Stage("kernels", 150, "lease_stages.kernels"),
    Stage("diffusers-eager", 90, "lease_stages.diffusers_fp16"),
    Stage("diffusers-compile", 200, "lease_stages.diffusers_fp16"),
    Stage("onnxruntime-cuda", 120, "lease_stages.project_backends"),
    Stage("tensorrt", 300, "lease_stages.project_backends"),
    Stage("tensorrt-rtx", 120, "lease_stages.project_backends"),
    Stage("backend-tests", 240, "lease_stages.device_tests"),
)
"""The first are worth the most. Their times add up to more than a usual budget, since few stages need all of theirs."""

NEEDED = {
    "annotated-types": "annotated_types",
    "cuda-bindings": "cuda.bindings",
    "diffusers": "diffusers",
    "filelock": "filelock",
    "numpy": "numpy",
    "onnx-ir": "onnx_ir",
    "onnxruntime": "onnxruntime",
    "pillow": "PIL",
    "platformdirs": "platformdirs",
    "pydantic": "pydantic",
    "pydantic-core": "pydantic_core",
    "pytest": "pytest",
    "requests": "requests",
    "tokenizers": "tokenizers",
    "torch": "torch",
    "transformers": "transformers",
    "typing-inspection": "typing_inspection",
}
"""Modules that the stages import, by the names of their packages."""
