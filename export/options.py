"""The options of an export."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runtime.format.manifest import TemporalNorm
from .embeddings import Embedding
from .loading import BASE_CONFIG, LoadOptions
from .lora_files import Lora


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What to export; sources are diffusers-format folders, hub names or single files.

    Attributes:
        base: a Stable Diffusion 1.5 checkpoint.
        motion_adapter: the motion modules of AnimateDiff.
        controlnets: SparseCtrl by kind, `scribble` or `rgb`.
        loras: fused into UNet and text encoder, in this order.
        embeddings: textual inversions, added to tokenizer and text encoder in this order.
        vae: a VAE to use instead of the base's.
        tiny_decoder: an AutoencoderTiny, or a file in TAESD's own format; its decoder is exported besides the VAE's.
        temporal_norm: see the manifest's `TemporalNorm`; None takes that which the motion modules were trained with.
        frames: default number of frames of a clip.
        height, width: default size of a clip in pixels; None takes the UNet's sample size.
        scheduler: overrides of the LCM schedule, by diffusers' names.
        base_config: see `LoadOptions`.
        variant: see `LoadOptions`.
    """

    base: str
    motion_adapter: str
    controlnets: dict[str, str] = field(default_factory=dict)
    loras: tuple[Lora, ...] = ()
    embeddings: tuple[Embedding, ...] = ()
    vae: str | None = None
    tiny_decoder: str | None = None
    temporal_norm: TemporalNorm | None = None
    frames: int = 16
    height: int | None = None
    width: int | None = None
    scheduler: dict[str, Any] = field(default_factory=dict)
    base_config: str = BASE_CONFIG
    variant: str | None = None

    @property
    def loading(self) -> LoadOptions:
        """How to load the sources."""
        return LoadOptions(self.base_config, self.variant)

    def sources(self) -> dict[str, str]:
        """Returns the sources for the bundle's manifest; local folders and files appear without their path."""
        named = {
            "base": self.base,
            "motion_adapter": self.motion_adapter,
            **{f"controlnet_{kind}": source for kind, source in self.controlnets.items()},
            **({"vae": self.vae} if self.vae else {}),
            **({"tiny_decoder": self.tiny_decoder} if self.tiny_decoder else {}),
        }
        loras = {
            f"lora_{index}": f"{public_name(lora.source)}={lora.weight:g}" for index, lora in enumerate(self.loras)
        }
        embeddings = {
            f"embedding_{index}": public_name(item.source) + (f"={item.token}" if item.token else "")
            for index, item in enumerate(self.embeddings)
        }
        return {key: public_name(source) for key, source in named.items()} | loras | embeddings


def public_name(source: str) -> str:
    """Returns a hub name unchanged, and a local folder or file without its path.

    A bundle must not reveal paths of the machine that exported it.
    """
    return Path(source).name if Path(source).exists() else source
