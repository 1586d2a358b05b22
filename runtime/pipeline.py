"""The pipeline: keyframes and a prompt in, a clip out."""

import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from .async_run import AsyncRuns
from .load_options import KEPT_BYTES, LoadOptions
from .many_requests import OnManyProgress, OnManyWarning, RequestResult, run_many
from .open_pipeline import OpenPipeline
from .output.clip import Clip
from .progress import OnFrames, OnPreview, OnProgress
from .request import ClipRequest, Keyframe

if TYPE_CHECKING:  # imported when a bundle is loaded: `import sparsectrl_lcm` stays quick
    from .backend_interface import Executor
    from .format.bundle import Bundle


class VideoPipeline(OpenPipeline):
    """AnimateDiff with SparseCtrl and LCM on one backend. Threads may share it; their requests take turns.

    In a `with` statement it is closed at the end of the block.
    """

    def __init__(
        self, bundle: "Bundle", executor: "Executor", weights: Mapping[str, str | os.PathLike[str]] | None = None
    ) -> None:
        super().__init__(bundle, executor, weights or {})
        self._async_runs = AsyncRuns()

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str] | None = None,
        backend: str = "auto",
        *,
        precision: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        kept_bytes: int = KEPT_BYTES,
        cuda_graphs: bool = True,
        warm: bool = False,
        weights: Mapping[str, str | os.PathLike[str]] | None = None,
    ) -> "VideoPipeline":
        """Opens a bundle.

        Args:
            bundle: the folder that `sparsectrl-lcm export` wrote; None opens the package's demo bundle.
            backend: auto, tensorrt, tensorrt-rtx, onnxruntime-cuda, openvino or onnxruntime. auto takes the first of
                them that can run here and has engines; the last two also run without engines.
            precision: precision of the engines: fp16, bf16, fp32, fp8 or int8. None takes the first that was built, in
                an order that fits the backend and the processor.
            device: for openvino: CPU (the default), GPU or NPU, by OpenVINO's names.
            threads: for openvino and onnxruntime on the CPU; None takes one per core.
            kept_bytes: memory in bytes for results that a later request with the same prompt and keyframes uses again,
                mostly SparseCtrl's residuals. If a request's residuals are larger, they are computed step by step.
            cuda_graphs: whether a GPU backend captures requests into CUDA graphs and replays them. False is slower; use
                it for measurements and to find faults.
            warm: whether to call `warmup` for the bundle's default size.
            weights: other bundles of the same architecture, each with a name by which requests ask for its LoRAs and
                motion module. They need engines that were built with refit.

        Raises:
            BundleError: a bundle is missing, damaged or has another version.
            BackendError: the backend cannot run here, or not in this precision, or its engines cannot get the weights
                of another bundle.
            InvalidRequest: `threads`, `kept_bytes`, `cuda_graphs` or `weights` is not allowed.
        """
        from .backends import open_executor
        from .format.bundle import Bundle

        options = LoadOptions(
            precision=precision, device=device, threads=threads, kept_bytes=kept_bytes, cuda_graphs=cuda_graphs
        )
        opened = Bundle.load(bundle)
        pipeline = cls(opened, open_executor(opened, backend, options), weights)
        if warm:
            pipeline.warmup()
        return pipeline

    def generate(
        self,
        prompt: str,
        keyframes: Sequence[Keyframe] = (),
        controlnet: Literal["scribble", "rgb"] = "scribble",
        negative_prompt: str = "",
        num_inference_steps: int = 4,
        guidance_scale: float = 1.0,
        seed: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        decoder: Literal["full", "tiny"] = "full",
        normalize_scribbles: bool = False,
        resample: Literal["lanczos", "bilinear"] = "lanczos",
        conditioning_scale: float = 1.0,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        clip_skip: int = 0,
        prompt_weights: bool = False,
        long_prompts: bool = False,
        context_length: int | None = None,
        context_overlap: int | None = None,
        weights: str | None = None,
        on_progress: OnProgress | None = None,
        on_frames: OnFrames | None = None,
        on_preview: OnPreview | None = None,
    ) -> Clip:
        """Makes a clip.

        Args:
            prompt: what the clip shows; cut to 77 tokens, with a warning, unless `long_prompts` is set.
            keyframes: at most one for each frame, in any order; index -1 is the last frame. Without keyframes the clip
                is plain AnimateDiff. TensorRT's engines take as many as they were built for, three by default.
            controlnet: what the keyframes are, `scribble` (white lines on black) or `rgb` (pictures).
            negative_prompt: what the clip does not show; used if guidance is on.
            num_inference_steps: LCM steps, 1 to 12.
            guidance_scale: classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598), 0 to 30; guidance is on
                above 1.
            seed: 0 to 2**64 - 1; None draws one at random. The noise is that of torch's CPU generator (within 4.8e-7).
            height, width: pixels, in multiples of 8; None takes the bundle's defaults.
            num_frames: 1 to 128; None takes the bundle's default.
            decoder: the decoder that makes the frames: `full` (the VAE's) or `tiny`, if the bundle has it.
            normalize_scribbles: whether to make scribbles grey and stretch them from black to white, for pale lines.
            resample: how keyframes of another size are resized: `lanczos` as in diffusers, or `bilinear` as in the
                original AnimateDiff code.
            conditioning_scale: how strongly keyframes guide the clip, 0 to 10; SparseCtrl's residuals are multiplied by
                it. 0 is as without keyframes.
            control_guidance_start, control_guidance_end: the part of the steps that keyframes guide, as fractions 0 to
                1. Step i of n is in it if i/n is at least the start and (i+1)/n at most the end.
            clip_skip: last layers of the text encoder that are skipped for the prompt, from 0 to all but one, as in
                diffusers: 1 takes the result of the layer before the last, which many fine-tuned models want.
            prompt_weights: whether brackets in the prompts are weights from 0 to 10: `(word:1.3)`, `(word)` for 1.1,
                `[word]` for 1/1.1, `\\(` for a plain parenthesis. Embeddings are those of the library compel.
            long_prompts: whether longer prompts are read in chunks of 77 tokens, as compel does. Engines of GPUs take
                one chunk.
            context_length: frames of a context window, 4 to the bundle's largest number (32 for v2 and v3, 24 for v1).
                Longer clips are made in windows of so many frames, which are blended at each step. None makes the clip
                in one piece if the bundle allows so many frames and the backend has engines for them, else in windows
                of the bundle's default number of frames.
            context_overlap: frames that consecutive windows share at least, below the window's length; None takes half
                of it. More overlap is smoother and slower.
            weights: a name from `weights` of `load`. None takes the pipeline's own, whatever the request before took.
            on_progress: called with a `Progress`; returning False cancels.
            on_frames: called with the index of the first frame and uint8 frames [n, H, W, 3], in order, as they are
                decoded: in parts on a CPU, all at once on a GPU. They are views of the clip's frames: do not change
                them. An exception in the callback ends the request and reaches the caller.
            on_preview: called after each step with the step, from 1, the index of a frame, and uint8 [h, w, 3]: the
                frame as the step predicts it, from the tiny decoder. Without one in the bundle it has an eighth of the
                sides, and approximate colours.

        Raises:
            InvalidRequest: a value is not allowed; nothing was computed.
            Cancelled: `on_progress` returned False.
            BackendError: the backend failed.
        """
        request = ClipRequest(
            prompt=prompt,
            keyframes=keyframes,
            controlnet=controlnet,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            seed=seed,
            height=height,
            width=width,
            num_frames=num_frames,
            decoder=decoder,
            normalize_scribbles=normalize_scribbles,
            resample=resample,
            conditioning_scale=conditioning_scale,
            control_guidance_start=control_guidance_start,
            control_guidance_end=control_guidance_end,
            clip_skip=clip_skip,
            prompt_weights=prompt_weights,
            long_prompts=long_prompts,
            context_length=context_length,
            context_overlap=context_overlap,
            weights=weights,
        )
        return self.run(request, on_progress, on_frames, on_preview)

    async def generate_async(
        self,
        prompt: str,
        keyframes: Sequence[Keyframe] = (),
        *,
        on_progress: OnProgress | None = None,
        on_frames: OnFrames | None = None,
        on_preview: OnPreview | None = None,
        **options: Any,
    ) -> Clip:
        """Makes a clip on another thread, while the event loop goes on.

        Cancelling the task ends the run at its next step, and the task when the run has ended. A task that waits for
        its turn ends at once.

        Args:
            prompt, keyframes: as for `generate`.
            on_progress, on_frames, on_preview: as for `generate`; called on the other thread.
            options: the other arguments of `generate`.

        Raises:
            InvalidRequest, Cancelled, BackendError: as `generate` does.
        """
        request = ClipRequest(prompt, keyframes, **options)
        return await self._async_runs.run(self.run, request, on_progress, on_frames, on_preview)

    def generate_many(
        self,
        requests: Iterable[ClipRequest],
        on_progress: OnManyProgress | None = None,
        on_warning: OnManyWarning | None = None,
    ) -> Generator[RequestResult, None, None]:
        """Yields the results of many requests, in order.

        While the caller uses a clip, the next request runs, and the keyframes of the one after it are read. So the
        request of a result is followed by two that were already taken from `requests`, and no more. Closing the
        iterator cancels them; the one that runs ends at its next step.

        A request that fails does not stop the others. Requests with the same prompt and keyframes in a row, such as
        those that differ in their seed, compute text and SparseCtrl once.

        Args:
            requests: any iterable, also one without end; an exception that it raises follows the results of the
                requests before it.
            on_progress: called with the position of a request, from 0, and a `Progress`, on another thread; returning
                False cancels this request.
            on_warning: called with the position of a request and a `RequestWarning`, on other threads, for every
                warning of every request; None logs them. An exception in the callback ends its request and is the
                error of its result.

        Raises:
            DeviceLost: the device is gone; this request and those after it have no result.
        """
        return run_many(self.check, self._make, requests, on_progress, on_warning)
