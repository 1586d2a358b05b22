"""Device memory: no growth over many requests, and errors when none is left."""

from typing import Any

import numpy as np
import pytest
from sparsectrl_lcm.runtime import VideoPipeline
from sparsectrl_lcm.runtime.errors import BackendError
from sparsectrl_lcm.runtime.gpu.cuda import Cuda, DeviceOutOfMemory

from .conftest import Load
from .requests import ask, assert_same, keyframes

pytestmark = pytest.mark.gpu

REQUESTS, SETTLED = 200, 40
TOLERANCE = 32 << 20
"""In bytes; the driver allocates memory in blocks."""
STEPS, GUIDANCE, SOURCES = (1, 2, 4), (1.0, 3.0), ("scribble", "rgb", None)


def device(pipeline: VideoPipeline) -> Cuda:
    executor: Any = pipeline.executor
    cuda: Cuda = executor._cuda
    return cuda


def test_device_memory_does_not_grow(load: Load) -> None:
    pipeline = load(kept_bytes=16 << 20)  # small, so that the cache is full before memory is compared
    generator = np.random.default_rng(0)
    used = []
    for number in range(REQUESTS):
        places = tuple(generator.choice(16, generator.integers(1, 4), replace=False).tolist())
        source = SOURCES[number % 3]
        ask(
            pipeline,
            source,
            seed=number,
            prompt=f"a red circle {generator.integers(1000)}",
            num_inference_steps=STEPS[number // 3 % 3],
            guidance_scale=GUIDANCE[number // 9 % 2],
            **({"keyframes": keyframes(places)} if source else {}),
        )
        free, total = device(pipeline).memory()
        used.append(total - free)
    assert max(used[SETTLED:]) - max(used[:SETTLED]) <= TOLERANCE


def test_a_request_that_finds_no_memory_fails_and_the_next_one_works(load: Load) -> None:
    pipeline = load()
    first = ask(pipeline)
    pipeline.close()
    cuda = device(pipeline)
    taken = fill(cuda)
    try:
        with pytest.raises(DeviceOutOfMemory) as caught:
            ask(pipeline)
        with pytest.raises(DeviceOutOfMemory):  # and once more
            ask(pipeline)
    finally:
        for address in taken:
            cuda.free(address)
    assert isinstance(caught.value, BackendError)
    assert "\n" not in str(caught.value)
    assert_same(pipeline, ask(pipeline), first)


def fill(cuda: Cuda) -> list[int]:
    """Allocates all device memory, except for pieces of less than 1 MiB."""
    taken, nbytes = [], 1 << 30
    while nbytes >= 1 << 20:
        try:
            taken.append(cuda.allocate(nbytes))
        except DeviceOutOfMemory:
            cuda.clear_error()
            nbytes //= 2
    return taken
