"""The endpoint's input and output as fal publishes them. Requests of `batch` are inputs with more fields."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from .advanced_options import KEY, AdvancedOptions

KEYFRAMES = (0, 1, 2)
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1
"""Seeds that torch's generators accept. A negative seed means the seed plus 2**64."""
INPUT_FIELDS = {"controlnet": "controlnet_type"} | {name: f"{KEY}.{name}" for name in AdvancedOptions.model_fields}
"""Options of the pipeline whose field in the input has another name."""


def own_seed(seed: int) -> int:
    """The seed of the pipeline, which takes no negative ones, for a seed from `MIN_SEED` to `MAX_SEED`."""
    return seed % 2**64 if seed < 0 else seed


def keyframe_index(which: str, example: int, last: int | None = None) -> Any:
    """Returns the field of a keyframe's frame; `last` is that of the clip, if it is known."""
    return Field(0, ge=0, le=last, description=f"The frame of the {which} keyframe.", examples=[example])


class Input(BaseModel):
    """The input of the endpoint. Unknown keys are ignored. The published schema has fal's fields alone.

    `input_model` adds what depends on the length of an endpoint's clips.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, title="AnimatediffLCMInput")

    prompt: str = Field(
        description="The prompt to use for generating the image. Be as descriptive as possible for best results.",
        examples=["Masterpiece, best quality, a panda drinking coffee"],
    )
    negative_prompt: str = Field("", description="What the clip should not show; counts with a guidance scale of 2.")
    controlnet_type: Literal["scribble", "rgb"] = Field(
        "scribble", description="The type of controlnet to use for generating the video, which the keyframes are for."
    )
    num_inference_steps: int = Field(4, ge=1, le=12, description="Steps of LCM; more take longer.")
    guidance_scale: int = Field(
        1, ge=0, le=2, title="Classifier-Free Guidance scale (CFG)", description="How closely to stick to the prompt."
    )
    seed: int | None = Field(
        None, ge=MIN_SEED, le=MAX_SEED, description="The same seed and input give the same clip.", examples=[42]
    )
    keyframe_0_index: int = keyframe_index("first", 0)
    keyframe_0_image_url: str | None = Field(None, description="URL or data URI of the first keyframe.")
    keyframe_1_index: int = keyframe_index("second", 8)
    keyframe_1_image_url: str | None = Field(None, description="URL or data URI of the second keyframe.")
    keyframe_2_index: int = keyframe_index("third", 15)
    keyframe_2_image_url: str | None = Field(None, description="URL or data URI of the third keyframe.")
    sparsectrl_lcm: SkipJsonSchema[AdvancedOptions | None] = None

    def keyframes(self) -> list[tuple[int, int, str]]:
        """Returns slot, frame and URL of the given keyframes. An empty URL means none."""
        given = ((slot, getattr(self, f"keyframe_{slot}_image_url")) for slot in KEYFRAMES)
        return [(slot, getattr(self, f"keyframe_{slot}_index"), url) for slot, url in given if url]

    @property
    def advanced(self) -> AdvancedOptions:
        """The options that fal lacks."""
        return self.sparsectrl_lcm or AdvancedOptions()

    def stored(self) -> dict[str, Any]:
        """Returns the given fields as JSON values, from which `model_validate` makes this input again."""
        return self.model_dump(exclude_unset=True)

    def options(self) -> dict[str, Any]:
        """Returns the keywords of `VideoPipeline.generate`, except the keyframes."""
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "controlnet": self.controlnet_type,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "seed": None if self.seed is None else own_seed(self.seed),
            **self.advanced.given(),
        }


class File(BaseModel):
    """A file that can be downloaded."""

    url: str = Field(description="The URL where the file can be downloaded from.")
    content_type: str = Field(description="The mime type of the file.", examples=["video/mp4"])
    file_name: str = Field(description="The name of the file.", examples=["clip.mp4"])
    file_size: int = Field(description="The size of the file in bytes.", examples=[404019])


class Output(BaseModel):
    """The output of the endpoint."""

    model_config = ConfigDict(title="AnimatediffLCMOutput")

    video: File = Field(description="Generated video file.")
    seed: int = Field(description="The seed that was used.", examples=[42])
