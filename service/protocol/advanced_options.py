"""Options that fal's endpoint lacks. An input has them in an object of its own, which fal ignores."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

KEY = "sparsectrl_lcm"
"""The input's key for the advanced options."""
MAX_CLIP_SKIP = 100
"""More layers than any text encoder has. The bundle's own limit counts when the clip is made."""


class AdvancedOptions(BaseModel):
    """Keywords of `VideoPipeline.generate`, with its defaults, and `previews`. Unknown keys are errors.

    Attributes:
        previews: whether streams show a frame after each step and while the clip is decoded.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    conditioning_scale: float = Field(1.0, ge=0, le=10, allow_inf_nan=False)
    control_guidance_start: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    control_guidance_end: float = Field(1.0, ge=0, le=1, allow_inf_nan=False)
    clip_skip: int = Field(0, ge=0, le=MAX_CLIP_SKIP)
    prompt_weights: bool = False
    long_prompts: bool = False
    normalize_scribbles: bool = False
    resample: Literal["lanczos", "bilinear"] = "lanczos"
    weights: str | None = None
    previews: bool = False

    def given(self) -> dict[str, Any]:
        """Returns the given options of the pipeline by name."""
        return self.model_dump(exclude_unset=True, exclude_none=True, exclude={"previews"})
