"""Pipelines on torch's engines, on the device or in a dry run on an emulated one, and which requests replay graphs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsectrl_lcm.runtime import VideoPipeline
from sparsectrl_lcm.runtime.format.bundle import Bundle
from sparsectrl_lcm.runtime.gpu.captures import GraphCache
from sparsectrl_lcm.runtime.gpu.cuda import Cuda
from sparsectrl_lcm.runtime.gpu.executor import GpuExecutor
from sparsectrl_lcm.runtime.load_options import KEPT_BYTES
from torch_engines.loader import TorchLoader

NOT_REPLAYED = "the CUDA graph was not replayed"
EMULATED_SIDE, EMULATED_FRAMES, EMULATED_STEPS = 64, 4, 2
"""The request of a dry run."""


@contextmanager
def torch_pipeline(folder: Path | None, dry_run: bool, cuda_graphs: bool = True, **options: Any) -> Iterator[Any]:
    """Opens a bundle in fp16; None opens the demo bundle. A dry run emulates a device that computes in fp32."""
    bundle = Bundle.load(folder)
    if dry_run:
        from fakes.gpu_emulation import EmulatedCudart
        from torch_engines.streams import HostStream

        api = EmulatedCudart()
        loader, cuda = TorchLoader("fp32", lambda device: HostStream(api, device.stream), **options), Cuda(api)
    else:
        loader, cuda = TorchLoader("fp16", **options), Cuda()
    pipeline = VideoPipeline(bundle, GpuExecutor(bundle, loader, KEPT_BYTES, cuda, cuda_graphs))
    try:
        yield pipeline
    finally:
        pipeline.close()


@contextmanager
def watched_replays() -> Iterator[list[bool]]:
    """Gives a list that gets an item for each request within the block: whether it replayed a CUDA graph."""
    seen: list[bool] = []
    replay = GraphCache.replay

    def watched(cache: GraphCache, *arguments: Any) -> bool:
        seen.append(replay(cache, *arguments))
        return seen[-1]

    GraphCache.replay = watched  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        GraphCache.replay = replay  # type: ignore[method-assign]
