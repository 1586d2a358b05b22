"""Arguments of diffusers' call: what they become here, and which are refused."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from .runtime import InvalidRequest, Keyframe
from .runtime.errors import shown
from .runtime.field_checks import integer
from .runtime.request import MAX_FRAMES

_ARGUMENTS = {
    "latents": "give a generator",
    "prompt_embeds": "give a prompt; VideoPipeline.generate takes prompt_weights",
    "negative_prompt_embeds": "give a negative_prompt",
    "ip_adapter_image": "leave it out",
    "ip_adapter_image_embeds": "leave it out",
    "cross_attention_kwargs": "give LoRAs and their weights to `sparsectrl-lcm export`",
    "guess_mode": "lower controlnet_conditioning_scale",
    "num_videos_per_prompt": "call the pipeline once for each clip",
    "callback_on_step_end_tensor_inputs": "leave it out: tensors stay in the backend",
}
"""Refused arguments, and what to do instead."""

_METHODS = {
    "to": "choose a backend in from_pretrained",
    "load_lora_weights": "give LoRAs to `sparsectrl-lcm export`",
    "set_adapters": "give LoRAs to `sparsectrl-lcm export`",
    "fuse_lora": "give LoRAs to `sparsectrl-lcm export`, which fuses them",
    "load_textual_inversion": "give embeddings to `sparsectrl-lcm export`",
    "load_ip_adapter": "leave it out",
    "enable_free_init": "leave it out",
    "enable_freeu": "leave it out",
    "enable_vae_slicing": "leave it out: frames are decoded in parts",
    "enable_vae_tiling": "leave it out: frames are decoded in parts",
    "enable_model_cpu_offload": "leave it out: choose a backend in from_pretrained",
    "enable_sequential_cpu_offload": "leave it out: choose a backend in from_pretrained",
    "enable_xformers_memory_efficient_attention": "leave it out",
    "set_progress_bar_config": "leave it out: no bar is shown",
}
"""Refused methods, and what to do instead."""


def refuse(**given: Any) -> None:
    """Raises InvalidRequest for the first argument that is not None."""
    for name, value in given.items():
        if value is not None:
            raise InvalidRequest(name, "is not supported here", _ARGUMENTS[name])


def refuse_method(owner: str, name: str) -> Callable[..., NoReturn]:
    """A method that raises InvalidRequest; AttributeError if diffusers' pipeline has none of this name either."""
    if name not in _METHODS:
        raise AttributeError(f"{owner!r} object has no attribute {name!r}")

    def method(*arguments: Any, **options: Any) -> NoReturn:
        raise InvalidRequest(name, "is not supported here", _METHODS[name])

    return method


def one_prompt(field: str, value: Any) -> Any:
    """The prompt, also out of a list of one."""
    if not isinstance(value, list):
        return value
    if len(value) != 1:
        raise InvalidRequest(field, f"a list of {len(value)} is not allowed", "call the pipeline once for each prompt")
    return value[0]


def keyframes(frames: Any, indices: Any, num_frames: Any, width: Any, height: Any) -> list[Keyframe]:
    """Keyframes in the clip's size, which is checked before pictures are stretched to it.

    As in diffusers, surplus pictures are ignored, and the last one of an index counts.
    """
    from .runtime.format.manifest import MAX_SIDE

    width, height = integer("width", width, 1, MAX_SIDE), integer("height", height, 1, MAX_SIDE)
    num_frames = integer("num_frames", num_frames, 1, MAX_FRAMES)
    if frames is None:
        raise InvalidRequest("conditioning_frames", "are missing", "VideoPipeline.generate makes clips without them")
    many = isinstance(frames, list | tuple) or getattr(frames, "ndim", 0) == 4
    pictures = list(frames) if many else [frames]
    if not isinstance(indices, Sequence) or len(pictures) < len(indices):
        what = f"{shown(indices)} does not fit the conditioning frames, of which there are {len(pictures)}"
        raise InvalidRequest("controlnet_frame_indices", what, "give one index for each")
    places = [integer("controlnet_frame_indices", index, -num_frames, num_frames - 1) for index in indices]
    last = {place % num_frames: picture for place, picture in zip(places, pictures, strict=False)}
    return [Keyframe(place, _picture(picture, width, height)) for place, picture in last.items()]


def _picture(picture: Any, width: int, height: int) -> Any:
    """A picture in the clip's size: one of Pillow is stretched, as by diffusers' `VaeImageProcessor`."""
    from PIL import Image

    if isinstance(picture, Image.Image):
        return picture.resize((width, height), Image.Resampling.LANCZOS).convert("RGB")
    if getattr(picture, "ndim", 0) == 4 and len(picture) == 1:
        picture = picture[0]
    if hasattr(picture, "detach"):  # a tensor [3, H, W]
        picture = np.moveaxis(picture.detach().cpu().float().numpy(), 0, -1)
    if not isinstance(picture, np.ndarray):
        what = f"{type(picture).__name__} is not allowed"
        raise InvalidRequest("conditioning_frames", what, "give Pillow images, numpy arrays or tensors")
    if picture.shape[:2] != (height, width):
        what = f"an array of shape {picture.shape} does not have the clip's size, {width}x{height}"
        raise InvalidRequest("conditioning_frames", what, "resize it, or give a Pillow image")
    return picture


def in_words_of_diffusers(error: InvalidRequest) -> InvalidRequest:
    """The error, with the name of the argument in diffusers' call."""
    field = error.field
    if field == "conditioning_scale":
        field = "controlnet_conditioning_scale"
    elif field.startswith("keyframe"):  # of a picture: "keyframe 3"
        field = "conditioning_frames"
    return InvalidRequest(field, error.reason, error.remedy)


class CallbackTensors(dict[str, Any]):
    """The empty dict of a callback; it says why it has no tensors."""

    def __missing__(self, name: str) -> NoReturn:
        raise InvalidRequest("callback_on_step_end", f"{name!r} is not available", "tensors stay in the backend")


class TorchNoise:
    """Draws from a copy of a `torch.Generator`, as diffusers' `randn_tensor` does.

    Args:
        generator: of the CPU.
    """

    def __init__(self, generator: Any) -> None:
        import torch

        self.seed = generator.initial_seed()
        self._generator = generator
        self._copy = torch.Generator()

    @classmethod
    def of(cls, generator: Any) -> "TorchNoise | None":
        """The noise of a caller's argument; None if torch, which the caller could have seeded, is not even imported."""
        if isinstance(generator, list) and len(generator) == 1:
            generator = generator[0]
        if generator is None:
            generator = getattr(sys.modules.get("torch"), "default_generator", None)
            return None if generator is None else cls(generator)
        if not hasattr(generator, "initial_seed") or not hasattr(generator, "get_state"):
            raise InvalidRequest("generator", f"{shown(generator)} is not allowed", "give one torch.Generator")
        if generator.device.type != "cpu":
            what = f"noise of {generator.device.type!r} cannot be drawn"
            raise InvalidRequest("generator", what, "give torch.Generator('cpu')")
        return cls(generator)

    def start(self) -> "TorchNoise":
        """Draws from the state in which the caller gave the generator."""
        self._copy.set_state(self._generator.get_state())
        return self

    def randn(self, shape: tuple[int, ...], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Standard normal values."""
        import torch

        values: NDArray[np.float32] = torch.randn(shape, generator=self._copy).numpy()
        if out is None:
            return values
        out[...] = values
        return out

    def finish(self) -> None:
        """Leaves the caller's generator in the state after what was drawn."""
        self._generator.set_state(self._copy.get_state())
