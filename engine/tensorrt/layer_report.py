"""Reports the layers of an engine with TensorRT's inspector: their types, and whether attention was fused."""

import json
import re
from collections import Counter
from typing import Any

from ...runtime.gpu.tensorrt_library import Library


def layer_report(library: Library, plan: Any) -> dict[str, Any]:
    """Counts layers by type, and fused and split attention of spatial and temporal transformers; needs a GPU.

    Raises:
        BackendError: the engine cannot be loaded here.
    """
    trt = library.module
    runtime = trt.Runtime(library.logger)
    runtime.engine_host_code_allowed = True  # --version-compatible engines contain their own runtime
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise library.failure("cannot load the engine that it built")
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return summarize(json.loads(text).get("Layers", []))


def summarize(layers: list[Any]) -> dict[str, Any]:
    """Counts layer types, and attentions that are fused into one kernel or split, with a softmax layer."""
    named = [layer if isinstance(layer, dict) else {"Name": str(layer)} for layer in layers]
    types = Counter(str(layer.get("LayerType", "unknown")) for layer in named)
    attention = {}
    for kind, scope in (("spatial", ".attentions."), ("temporal", ".motion_modules.")):
        texts = [f"{layer.get('Name', '')} {layer.get('Metadata', '')}" for layer in named]
        mine = [(layer, text) for layer, text in zip(named, texts, strict=True) if scope in text and ".attn" in text]
        fused = sum(_is_fused(layer) for layer, _ in mine)
        split = sum(_is_softmax(layer) for layer, _ in mine)
        attention[kind] = {"fused": fused, "split": split}
    return {"layers": dict(types.most_common()), "attention": attention}


def _is_fused(layer: dict[str, Any]) -> bool:
    """Whether a layer is a fused attention kernel, judged by TensorRT's names for them."""
    names = " ".join(str(layer.get(field, "")) for field in ("LayerType", "TacticName", "Name"))
    return bool(re.search(r"mha|flash|(?<!\.)attention(?!s\.)", names.lower().split(".attn")[0]))


def _is_softmax(layer: dict[str, Any]) -> bool:
    """Whether a layer is a separate softmax, also by the names of kernels that TensorRT's compiler generates."""
    names = f"{layer.get('LayerType', '')} {layer.get('Name', '')}".lower()
    return not _is_fused(layer) and ("softmax" in names or "maxsubexp" in names)
