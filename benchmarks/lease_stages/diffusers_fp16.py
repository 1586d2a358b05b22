"""diffusers with the same architecture and request in fp16, eager and compiled. Its weights are torch's defaults."""

import time

from .processes import CannotRun, Settings, Write
from .requests import checkpoints_folder, job_of, percentiles


def measure(settings: Settings, write: Write) -> None:
    """Writes the seconds of the first request, then the samples, then the samples with their stages."""
    if settings.dry_run and settings.stage != "diffusers-eager":
        raise CannotRun("torch.compile needs a C++ compiler on a CPU; a dry run leaves it out")
    import torch
    from gpu_worker import SAMPLING, sample_diffusers
    from sparsectrl_lcm.benchmarks.random_checkpoints import FULL_SIZE, Architecture
    from sparsectrl_lcm.benchmarks.random_pipeline import sparsectrl_pipeline

    begin = time.perf_counter()
    arch = Architecture() if settings.dry_run else FULL_SIZE
    device, dtype = ("cpu", torch.float32) if settings.dry_run else ("cuda", torch.float16)
    pipe = sparsectrl_pipeline(checkpoints_folder(settings), arch, device, dtype)
    job = job_of(settings, settings.stage, "random")
    for row in sample_diffusers(job, pipe, device, begin, settings.deadline(SAMPLING)):
        write(row | percentiles(row.get("samples", {})))
