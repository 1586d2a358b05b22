"""The layout of a clip: the tensor shapes of all graphs at its size.

The manifest has symbolic dimensions, such as `("batch*frames", 320, "latent_height/2", "latent_width/2")`.
A `ClipLayout` holds the number for each name, either for a request on the host or for static engines.
"""

from dataclasses import dataclass

from .decoders import DECODERS
from .manifest import GraphRecord, Manifest, Record, Sizes, resolve_shape

ONE_PROMPT = {"batch": 1}
"""The batch size of compiled graphs. A request with guidance runs them once per prompt, so one graph serves both."""
ENGINE_DECODE_PIXELS = 8 * 512 * 512
"""Pixels that an engine decodes at a time; bounds the memory of the decoder."""
TOKENS = 77
"""Tokens that CLIP reads at a time."""
ADDRESS_ALIGNMENT = 256
"""Bytes; TensorRT requires the addresses of inputs and outputs to be multiples of this."""


class ClipSize(Record):
    """Width and height of a clip in pixels, and its frames."""

    width: int
    height: int
    frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


@dataclass(frozen=True, slots=True)
class ClipLayout:
    """The numbers for the symbolic dimensions.

    Attributes:
        sizes: the bundle's; gives the VAE's scale factor and the channels of the latents.
        clip: size of the clip.
        prompts: prompts in a batch; 2 with guidance.
        keyframes: keyframes that SparseCtrl and the VAE's encoder take.
        decoded: frames that the full decoder takes at a time; divides the clip's frames.
        tokens: tokens of the prompt's embeddings.
    """

    sizes: Sizes
    clip: ClipSize
    prompts: int = 1
    keyframes: int = 0
    decoded: int = 1
    tokens: int = TOKENS

    @property
    def latent_shape(self) -> tuple[int, int, int, int, int]:
        """Shape of the latents, [1, 4, F, H/8, W/8]."""
        factor = self.sizes.vae_scale_factor
        return (1, self.sizes.latent_channels, self.clip.frames, self.clip.height // factor, self.clip.width // factor)

    def decoded_by(self, decoder: str) -> int:
        """Frames that a decoder's graph takes at a time: one for the tiny decoder, which makes previews too."""
        return 1 if decoder == DECODERS["tiny"] else self.decoded

    def decoder_runs(self, decoder: str) -> int:
        """Number of runs of a decoder's graph that make the whole clip."""
        return self.clip.frames // self.decoded_by(decoder)

    def dimensions(self, graph: str) -> dict[str, int]:
        """The symbolic dimensions of a graph; `images` are keyframes in the VAE's encoder and frames in decoders."""
        *_, latent_height, latent_width = self.latent_shape
        return {
            "batch": self.prompts,
            "frames": self.clip.frames,
            "height": self.clip.height,
            "width": self.clip.width,
            "latent_height": latent_height,
            "latent_width": latent_width,
            "distinct_frames": self.keyframes + 1,
            "images": self.keyframes if graph == "vae_encoder" else self.decoded_by(graph),
            "tokens": self.tokens,
        }

    def shapes(self, graph: str, record: GraphRecord) -> dict[str, tuple[int, ...]]:
        """Shapes of a graph's inputs and outputs, by name."""
        dimensions = self.dimensions(graph)
        return {item.name: resolve_shape(item.shape, dimensions) for item in (*record.inputs, *record.outputs)}


def engine_layout(manifest: Manifest, clip: ClipSize) -> ClipLayout:
    """The layout that static engines of one size are built for.

    An engine takes one prompt and runs twice with guidance, so one set of weights and activations serves both. Up to
    704x704 pixels, no attention then has more than 65,535 rows of batch and heads. SparseCtrl and the VAE's
    encoder take all keyframe slots. The full decoder takes as many frames as fit into `ENGINE_DECODE_PIXELS`.
    """
    decoded = frames_decoded_at_a_time(clip, ENGINE_DECODE_PIXELS)
    tokens, slots = manifest.max_tokens, manifest.keyframe_slots
    return ClipLayout(manifest.sizes, clip, prompts=1, keyframes=slots, decoded=decoded, tokens=tokens)


def static_shapes(manifest: Manifest, graph: str, clip: ClipSize) -> dict[str, tuple[int, ...]]:
    """Shapes of a graph's inputs and outputs in an engine of one size, by name."""
    return engine_layout(manifest, clip).shapes(graph, manifest.graphs[graph])


def frames_decoded_at_a_time(clip: ClipSize, max_pixels: int) -> int:
    """The largest number of frames to decode together. All parts are equal, so that one compiled decoder serves them.

    Args:
        clip: size of the clip.
        max_pixels: limit on the pixels of a part, which has at least one frame.
    """
    parts = [count for count in range(1, clip.frames + 1) if not clip.frames % count]
    return max((count for count in parts if count * clip.height * clip.width <= max_pixels), default=1)
