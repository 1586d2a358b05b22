"""TensorRT's plans on Polygraphy's runner."""

import subprocess
import sys
from pathlib import Path

import pytest
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType
from sparsectrl_lcm.engine.verify.header import Header
from sparsectrl_lcm.engine.verify.runners import quiet, run
from sparsectrl_lcm.engine.verify.saved_results import SavedResults
from sparsectrl_lcm.runtime import BackendError
from sparsectrl_lcm.runtime.format.clip_layout import ClipSize


class TakesBfloat16(BaseRunner):
    """A runner of a plan with an input in bfloat16."""

    def activate_impl(self) -> None:
        pass

    def deactivate_impl(self) -> None:
        pass

    def get_input_metadata_impl(self) -> TensorMetadata:
        return TensorMetadata().add("mid_residual", DataType.BFLOAT16, (1,))


def test_bfloat16_is_the_reason_in_the_note(tmp_path: Path) -> None:
    results = SavedResults(tmp_path, Header(size=ClipSize(width=32, height=32, frames=2), graphs={}, runs={"unet": 1}))
    with (
        pytest.raises(BackendError, match="verify: Polygraphy: .* bfloat16 to a corresponding numpy data type"),
        quiet(),
    ):
        run(TakesBfloat16(name="library"), results, "unet")


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
