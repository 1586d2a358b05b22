"""A request that a bundle can fulfil; all code after the check relies on its values."""

from collections.abc import Callable
from dataclasses import dataclass

from .format.clip_layout import TOKENS, ClipLayout, ClipSize, frames_decoded_at_a_time
from .format.decoders import DECODERS
from .format.manifest import Sizes
from .loop.noise import NoiseSource, TorchGenerator
from .loop.schedule import controlled_steps
from .loop.windows import Windows, windows_of_steps
from .request import FittedKeyframe


@dataclass(frozen=True, slots=True, eq=False)
class CheckedRequest:
    """A request that a bundle can fulfil, with the defaults filled in.

    Attributes:
        prompt: what the clip shows.
        negative_prompt: what the clip does not show.
        keyframes: by ascending index.
        controlnet: what the keyframes are, `scribble` or `rgb`; None without keyframes.
        steps: LCM steps.
        guidance_scale: strength of classifier-free guidance.
        seed: seed of the noise.
        height, width: pixels.
        frames: frames of the clip.
        decoder: a name in `DECODERS`.
        conditioning_scale: factor on SparseCtrl's residuals.
        clip_skip: last layers of the text encoder that are skipped.
        prompt_weights: whether brackets in the prompts are weights.
        long_prompts: whether prompts may take several chunks of tokens.
        control_guidance_start, control_guidance_end: fractions of the steps between which keyframes guide the clip.
        context_length: frames of a context window; None makes the clip in one piece.
        context_overlap: frames that consecutive windows share at least.
        weights: name of the weights; None takes those of the pipeline.
        noise: starts the source of the noise; None takes torch's generator with the seed.
    """

    prompt: str
    negative_prompt: str
    keyframes: tuple[FittedKeyframe, ...]
    controlnet: str | None
    steps: int
    guidance_scale: float
    seed: int
    height: int
    width: int
    frames: int
    decoder: str = "full"
    conditioning_scale: float = 1.0
    control_guidance_start: float = 0.0
    control_guidance_end: float = 1.0
    clip_skip: int = 0
    prompt_weights: bool = False
    long_prompts: bool = False
    context_length: int | None = None
    context_overlap: int = 0
    weights: str | None = None
    noise: Callable[[], NoiseSource] | None = None

    @property
    def controlled_steps(self) -> range:
        """The steps that keyframes guide, counted from 0; none without keyframes."""
        if not self.keyframes:
            return range(0)
        return controlled_steps(self.steps, self.control_guidance_start, self.control_guidance_end)

    @property
    def decoder_graph(self) -> str:
        """The graph that makes the frames."""
        return DECODERS[self.decoder]

    def noise_source(self) -> NoiseSource:
        """The source of the noise, at its start: each attempt at the request draws the same."""
        return TorchGenerator(self.seed) if self.noise is None else self.noise()

    @property
    def guidance(self) -> bool:
        """Whether the negative prompt is used: true if the guidance scale is above 1."""
        return self.guidance_scale > 1

    @property
    def texts(self) -> list[str]:
        """The prompts that the UNet sees; with guidance the negative prompt comes first."""
        return [self.negative_prompt, self.prompt] if self.guidance else [self.prompt]

    @property
    def clip_size(self) -> ClipSize:
        """Width, height and frames."""
        return ClipSize(width=self.width, height=self.height, frames=self.frames)

    @property
    def window_size(self) -> ClipSize:
        """Width, height and frames of a context window: what the graphs run on at a time."""
        return ClipSize(width=self.width, height=self.height, frames=self.context_length or self.frames)

    def windows(self) -> tuple[Windows, ...]:
        """The context windows of each step; one with all frames if the clip is made in one piece."""
        places = [item.index for item in self.keyframes]
        return windows_of_steps(self.frames, self.window_size.frames, self.context_overlap, places, self.steps)

    @property
    def keyframes_at_a_time(self) -> int:
        """The most keyframes of any context window."""
        places = [item.index for item in self.keyframes]
        return max(window.count(places) for windows in self.windows() for window in windows)

    def layout(self, sizes: Sizes, decode_pixels: int, tokens: int = TOKENS) -> ClipLayout:
        """The layout of a context window, for the request's number of prompts and the most keyframes of a window.

        Args:
            sizes: the bundle's sizes.
            decode_pixels: limit on the pixels that are decoded at a time.
            tokens: tokens of the prompt's embeddings.
        """
        window = self.window_size
        return ClipLayout(
            sizes,
            window,
            prompts=len(self.texts),
            keyframes=self.keyframes_at_a_time,
            decoded=frames_decoded_at_a_time(window, decode_pixels),
            tokens=tokens,
        )
