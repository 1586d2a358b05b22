"""The input with `serve --extensions`: fields beyond fal's for the size, the length and the format of the clip."""

from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from ...runtime.format.manifest import MAX_SIDE
from ...runtime.output.writers import MAX_FPS, MAX_GIF_FPS
from ...runtime.request import MAX_FRAMES
from .clip_input import Input

SIDE: dict[str, Any] = {"ge": 8, "le": MAX_SIDE, "multiple_of": 8}


def frames_asked_for(default: str, most: int = MAX_FRAMES) -> Any:
    """Returns the field of the clip's length; its description names the default."""
    return Field(None, ge=1, le=most, description=f"Frames of the clip; {default} by default.")


class ExtendedInput(Input):
    """The input of the endpoint with fields that fal lacks. What the bundle and its engines allow may be less."""

    model_config = ConfigDict(extra="ignore", frozen=True, title="AnimatediffLCMInput")

    width: int | None = Field(None, **SIDE, description="Pixels; those of the bundle by default.")
    height: int | None = Field(None, **SIDE, description="Pixels; those of the bundle by default.")
    num_frames: int | None = frames_asked_for("those of the bundle")
    output_format: Literal["mp4", "webm", "gif", "webp"] = Field("mp4", description="The format of the file.")
    fps: float = Field(8, ge=1, le=MAX_FPS, allow_inf_nan=False, description="Frames per second, at most 50 in a GIF.")

    @field_validator("fps")
    @classmethod
    def _shown_by_browsers(cls, fps: float, info: ValidationInfo) -> float:
        if info.data.get("output_format") == "gif" and fps > MAX_GIF_FPS:
            raise PydanticCustomError(
                "less_than_equal", "Input should be less than or equal to {le}, in a GIF", {"le": MAX_GIF_FPS}
            )
        return fps

    def options(self) -> dict[str, Any]:
        """Returns the keywords of `VideoPipeline.generate`, except the keyframes."""
        sizes = {"width": self.width, "height": self.height, "num_frames": self.num_frames}
        return super().options() | {name: value for name, value in sizes.items() if value is not None}
