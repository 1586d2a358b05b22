"""TensorRT's plans on Polygraphy's runner."""

import subprocess
import sys


def test_the_library_runner_runs_the_plan_of_the_set() -> None:
    """Polygraphy uses the bindings of TensorRT-RTX, whose module it does not know by name."""
    code = (
        "from sparsectrl_lcm.engine.tensorrt.plan_runner import _trt_runner\n"
        "from sparsectrl_lcm.runtime.gpu.tensorrt_library import load_library\n"
        "library = load_library('tensorrt-rtx')\n"
        "runner = _trt_runner(library)\n"
        "from polygraphy.backend.trt.runner import trt\n"
        "assert trt.ICudaEngine is library.module.ICudaEngine\n"
        "print(runner.__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout == "TrtRunner\n", result.stderr
