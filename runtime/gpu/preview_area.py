"""Previews on the device: one frame of each step, copied to page-locked memory while the request runs."""

from math import prod
from typing import TYPE_CHECKING

import numpy as np

from ..cpu.sessions import Array
from ..format.decoders import DECODERS
from ..loop.previews import latent_colours, previewed_frame
from ..request import MAX_STEPS
from .buffers import aligned, host_array
from .cuda import Cuda
from .program import Preview

if TYPE_CHECKING:
    from .workspace import Workspace


class PreviewArea:
    """The page-locked memory for the previews of a request, one for each step."""

    def __init__(self, workspace: "Workspace", cuda: Cuda) -> None:
        size, (_, channels, _, height, width) = workspace.size, workspace.layout.latent_shape
        self._workspace = workspace
        self._cuda = cuda
        self._index = previewed_frame(size.frames)
        self._latents_shape = (channels, height, width)
        self._frame_shape = (size.height, size.width, 3)
        self._stride = aligned(max(prod(self._frame_shape), 4 * prod(self._latents_shape)))
        self._host = 0

    def reserve(self) -> None:
        """Allocates the memory, which a capture cannot do."""
        if not self._host:
            self._host = self._cuda.allocate_host(self._stride * MAX_STEPS)

    def enqueue(self, kind: Preview, step: int) -> None:
        """Enqueues the preview of a step. A decoded one uses the frames' memory, which the last decoder run fills."""
        workspace = self._workspace
        if kind == "tiny":
            workspace.decode(DECODERS["tiny"], self._index)
            name, nbytes = "frames", prod(self._frame_shape)
        else:
            name, nbytes = "images", 4 * prod(self._latents_shape)
        self._cuda.copy_out(self._host + step * self._stride, workspace.at(name) + self._index * nbytes, nbytes)

    def frame(self, kind: Preview, step: int) -> Array:
        """The preview of a step that the device has made: uint8 [H, W, 3], or [H/8, W/8, 3] of latents."""
        address = self._host + step * self._stride
        if kind == "tiny":
            return np.array(host_array(address, self._frame_shape, "uint8"))
        return latent_colours(host_array(address, self._latents_shape, "float32"))

    def close(self) -> None:
        """Frees the memory."""
        host, self._host = self._host, 0
        if host:
            self._cuda.free_host(host)
