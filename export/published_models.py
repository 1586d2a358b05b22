"""What published motion modules and LoRAs need and their weights do not tell: norms, schedule, weight.

Sources: guoyww/AnimateDiff (configs/inference) and G-U-N/AnimateLCM (animatelcm_sd15, model card).
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.format.manifest import TemporalNorm

if TYPE_CHECKING:
    from .options import ExportOptions

ANIMATELCM_POSITIONS = 64
"""AnimateLCM's motion module in its own format holds no positions: its code computes the sines of as many."""
COMPUTED_POSITIONS = "_computed_positions"
"""A setting of motion modules from a file in their own format: whether the file holds no positions."""
ANIMATELCM_STEPS = 100
"""`original_inference_steps` of AnimateLCM."""
LCM_STEPS = 50
"""Those of the LCM-LoRA, and diffusers' default."""
ANIMATELCM_LORA_WEIGHT = 0.8
_ANIMATELCM = re.compile(r"animate[-_ ]?lcm|sd15_t2v_beta|sd15_lora_beta", re.IGNORECASE)
"""Matches AnimateLCM's names, and those that its files had at first. Its LoRA has the layout of the LCM-LoRA."""


def is_v1(motion: Mapping[str, Any]) -> bool:
    """Whether the settings of motion modules are those of AnimateDiff v1 (`mm_sd_v14`, `mm_sd_v15`).

    v2 has motion modules in the middle block; v3, which has none either, has 32 positions instead of 24.
    """
    return not motion["use_motion_mid_block"] and motion["motion_max_seq_length"] != 32


def temporal_norm(motion: Mapping[str, Any]) -> TemporalNorm:
    """Returns the norms that motion modules of these settings were trained with."""
    return "resnet-clip" if is_v1(motion) else "frame"


def is_animatelcm(source: str, motion: Mapping[str, Any]) -> bool:
    """Whether motion modules are AnimateLCM's, by their name, or by a file with a middle block and without positions.

    64 positions tell nothing: those of LongAnimateDiff have as many, and AnimateLCM's in diffusers format have 32.
    """
    built_so = motion["use_motion_mid_block"] and motion.get(COMPUTED_POSITIONS, False)
    return built_so or is_named_animatelcm(source)


def lora_weight(source: str) -> float:
    """Returns the weight of a LoRA for which none is given."""
    return ANIMATELCM_LORA_WEIGHT if is_named_animatelcm(source) else 1.0


def is_named_animatelcm(source: str) -> bool:
    """Whether a name on the hub, a file or a folder is called AnimateLCM; the folders above say nothing.

    diffusers gives its files the same names everywhere, and the hub's cache its folders: then the name stands above.
    """
    path = Path(source)
    if not path.exists():  # OWNER/NAME or OWNER/NAME/FILE
        return _ANIMATELCM.search("/".join(path.parts[1:] or path.parts)) is not None
    path = path.resolve() if path.name in (".", "..", "") else path
    if path.name.startswith(("diffusion_pytorch_model", "pytorch_lora_weights")):
        path = path.parent
    if path.parent.name == "snapshots":
        path = path.parent.parent
    return _ANIMATELCM.search(path.name) is not None


def schedule(source: str, motion: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of the LCM schedule that motion modules need."""
    return {"original_inference_steps": ANIMATELCM_STEPS} if is_animatelcm(source, motion) else {}


def choices(options: "ExportOptions", motion: Mapping[str, Any]) -> Iterator[str]:
    """Yields a line for each setting that follows from what a source is and that no option gives."""
    if is_v1(motion) and options.temporal_norm is None:
        positions = motion["motion_max_seq_length"]
        yield f"temporal norm {temporal_norm(motion)}: AnimateDiff v1 ({positions} positions, no middle block)"
    for name, value in schedule(options.motion_adapter, motion).items():
        if name not in options.scheduler:
            yield f"{name} {value}: the motion modules are AnimateLCM's"
    for lora in options.loras:
        if lora_weight(lora.source) == lora.weight != 1:
            yield f"lora weight {lora.weight:g}: {Path(lora.source).name} is AnimateLCM's"
