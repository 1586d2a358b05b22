"""Reports what an engine is made of: kernels by kind, fused and split attention, norms in fp32, bytes moved."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ...runtime.format.layer_report import AttentionCounts, LayerReport
from ...runtime.gpu.tensorrt_library import Library
from .kernel_work import work_of
from .kernels import Kernel, kernels_of_inspector

_KINDS = {"spatial": ".attentions.", "temporal": ".motion_modules."}
"""The words in the names of an attention's nodes, by kind of transformer."""
_ATTENTION = re.compile(r"[^\s\[\]+:]*\.attn\d+(?=[./]|$)")
_FP16_SUMS = re.compile(
    r"(?<![a-z0-9])h(884|1688|16816|\d+x\d+x\d+)(?![0-9])"  # cutlass and cuDNN: h for half, s for fp32
    r"|(?<![a-z0-9])f16f16_f16f16_f16(?![0-9])"  # xmma: operands, results, sums
    r"|(?<![a-z0-9])f16_f16_f16_(void|f16)(?![0-9])"  # cutlass 3: both operands, sums, results
)
"""Words in the names of implementations that add products of fp16 in fp16."""
_NORM = re.compile(r"(?:Group|Instance|Layer)Normalization(?:_\d+)?$")


def kernels_of_plan(library: Library, plan: Any) -> list[Kernel]:
    """Reads the kernels of an engine with TensorRT's inspector; needs a GPU.

    Raises:
        BackendError: the engine cannot be loaded here.
    """
    trt = library.module
    runtime = trt.Runtime(library.logger)
    runtime.engine_host_code_allowed = True  # --version-compatible engines contain their own runtime
    engine = library.call("cannot load the engine that it built", runtime.deserialize_cuda_engine, plan)
    inspector = engine.create_engine_inspector()
    return kernels_of_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def summarize(kernels: Sequence[Kernel]) -> LayerReport:
    """Reports the kernels of an engine."""
    fused, split = _attentions(kernels)
    norms = {node for kernel in kernels for node in kernel.nodes if _NORM.search(node)}
    return LayerReport(
        layers=dict(Counter(kernel.kind for kernel in kernels).most_common()),
        attention={
            kind: AttentionCounts(fused=_count(fused, scope), split=_count(split, scope))
            for kind, scope in _KINDS.items()
        },
        split_attention=tuple(sorted(split)),
        norms=len(norms),
        fp32_norms=tuple(sorted(norms & {node for kernel in kernels if _writes_fp32(kernel) for node in kernel.nodes})),
        bytes_moved=sum(kernel.bytes_moved for kernel in kernels) or None,
        fp16_sums=tuple(sorted(kernel.name for kernel in kernels if _adds_in_fp16(kernel))),
        work=work_of(kernel for kernel in kernels if kernel.inputs or kernel.outputs),
    )


def _count(modules: Iterable[str], scope: str) -> int:
    return sum(scope in module for module in modules)


def _attentions(kernels: Sequence[Kernel]) -> tuple[set[str], set[str]]:
    """The attention modules of the transformers that are one fused kernel, and those that are several kernels."""
    fused: set[str] = set()
    several: set[str] = set()
    for kernel in kernels:
        modules = {name for text in (kernel.name, *kernel.nodes) for name in _ATTENTION.findall(text)}
        modules = {name for name in modules if any(scope in name for scope in _KINDS.values())}
        if _is_fused(kernel):
            fused |= modules
        elif _is_softmax(kernel):
            several |= modules
        else:
            several |= {name for name in modules if any(node.startswith(f"{name}/Attention") for node in kernel.nodes)}
    return fused, several - fused


def _is_fused(kernel: Kernel) -> bool:
    """Whether a kernel is a fused attention, judged by TensorRT's names for them."""
    names = f"{kernel.kind} {kernel.tactic} {kernel.name}"
    return bool(re.search(r"mha|flash|(?<!\.)attention(?!s\.)", names.lower().split(".attn")[0]))


def _is_softmax(kernel: Kernel) -> bool:
    """Whether a kernel is a separate softmax, also by the names of kernels that TensorRT's compiler generates."""
    return bool(re.search(r"softmax|maxr?subexp", f"{kernel.kind} {kernel.name}".lower()))


def _adds_in_fp16(kernel: Kernel) -> bool:
    """Whether an implementation adds fp16 products in fp16. TensorRT-RTX chooses it at run time and does not tell."""
    return bool(_FP16_SUMS.search(kernel.tactic.lower()))


def _writes_fp32(kernel: Kernel) -> bool:
    """Whether a kernel writes a whole activation in fp32, and not only the statistics of one."""
    largest = max((tensor.elements for tensor in kernel.inputs), default=0)
    return any(tensor.is_fp32 and tensor.elements == largest for tensor in kernel.outputs)
