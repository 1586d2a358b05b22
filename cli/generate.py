"""`sparsectrl-lcm generate`."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..runtime import ClipRequest, Keyframe, VideoPipeline


def generate(
    prompt: Annotated[str, typer.Option(help="What the clip shows.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="File .mp4, .webm, .gif, .webp, .png (contact sheet), or a folder (frames); - for stdout.",
        ),
    ],
    format: Annotated[
        str | None, typer.Option(help="With `-o -`: mp4 (the default), webm, gif, webp or png (contact sheet).")
    ] = None,
    negative_prompt: Annotated[str, typer.Option(help="What it does not show; used with --guidance above 1.")] = "",
    controlnet: Annotated[str, typer.Option(help="What the keyframes are: scribble or rgb.")] = "scribble",
    keyframe: Annotated[
        list[str] | None,
        typer.Option(metavar="INDEX=IMAGE", help="A picture for a frame, -1 for the last; repeatable."),
    ] = None,
    steps: Annotated[int, typer.Option(help="LCM steps, 1 to 12.")] = 4,
    guidance: Annotated[float, typer.Option(help="Guidance scale, 0 to 30; above 1 takes twice the work.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="0 to 2^64 - 1; random by default.")] = None,
    seeds: Annotated[
        int, typer.Option(help="Clips to make, 1 to 100, with the seed and those that follow it; named CLIP-seedN.")
    ] = 1,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Size in pixels; the bundle's by default.")] = None,
    frames: Annotated[int | None, typer.Option(help="1 to 128; the bundle's by default.")] = None,
    normalize_scribbles: Annotated[
        bool, typer.Option("--normalize-scribbles", help="Stretch scribbles from black to white, for pale lines.")
    ] = False,
    resample: Annotated[
        str, typer.Option(help="How keyframes of another size are resized: lanczos or bilinear.")
    ] = "lanczos",
    decoder: Annotated[str, typer.Option(help="full, or tiny if exported with --tiny-decoder.")] = "full",
    conditioning_scale: Annotated[float, typer.Option(help="How strongly keyframes guide the clip, 0 to 10.")] = 1.0,
    control_start: Annotated[
        float, typer.Option(help="Fraction of the steps, 0 to 1, from which keyframes guide the clip.")
    ] = 0.0,
    control_end: Annotated[
        float, typer.Option(help="Fraction of the steps, 0 to 1, up to which keyframes guide the clip.")
    ] = 1.0,
    clip_skip: Annotated[int, typer.Option(help="Last layers of the text encoder to skip; 1 for many models.")] = 0,
    prompt_weights: Annotated[
        bool, typer.Option("--prompt-weights", help="Read (word:1.3), (word) and [word] as weights.")
    ] = False,
    long_prompts: Annotated[
        bool, typer.Option("--long-prompts", help="Read prompts beyond 77 tokens in chunks; on a CPU.")
    ] = False,
    context_length: Annotated[
        int | None,
        typer.Option(
            help="Frames of a context window, 4 to 32; by default clips of up to 32 frames are in one piece (v1: 24)."
        ),
    ] = None,
    context_overlap: Annotated[
        int | None, typer.Option(help="Frames that consecutive windows share at least; by default half of a window.")
    ] = None,
    fps: Annotated[float, typer.Option(help="Frames per second, 1 to 60 (GIF: 50).")] = 8.0,
    no_metadata: Annotated[
        bool, typer.Option("--no-metadata", help="Write no prompt, seed and so on into the file.")
    ] = False,
    bundle: Annotated[Path | None, typer.Option(help="A folder from `export`; the demo bundle by default.")] = None,
    backend: Annotated[
        str, typer.Option(help="auto, tensorrt, tensorrt-rtx, openvino, onnxruntime-cuda or onnxruntime.")
    ] = "auto",
    precision: Annotated[
        str | None,
        typer.Option(help="Of the engines: fp16, bf16, fp32, fp8 or int8; default: the first that was built."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="For openvino: CPU (default), GPU or NPU.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads on the CPU; one per core by default.")] = None,
) -> None:
    """Make a clip from a prompt and keyframes."""
    from ..runtime import ClipRequest, VideoPipeline
    from ..runtime.format.bundle import Bundle
    from ..runtime.load_options import LoadOptions
    from ..runtime.one_shot import one_shot_backend
    from ..runtime.output.writers import check_output
    from .ctrl_c import interruptible
    from .options import parse_size
    from .seeds import generate_seeds, seed_outputs, seed_requests

    keyframes = [_keyframe(text) for text in keyframe or ()]
    width, height = parse_size(size)
    request = ClipRequest(
        prompt,
        keyframes,
        controlnet,
        negative_prompt,
        num_inference_steps=steps,
        guidance_scale=guidance,
        seed=seed,
        height=height,
        width=width,
        num_frames=frames,
        decoder=decoder,
        normalize_scribbles=normalize_scribbles,
        resample=resample,
        conditioning_scale=conditioning_scale,
        control_guidance_start=control_start,
        control_guidance_end=control_end,
        clip_skip=clip_skip,
        prompt_weights=prompt_weights,
        long_prompts=long_prompts,
        context_length=context_length,
        context_overlap=context_overlap,
    )
    if normalize_scribbles and controlnet != "scribble":
        typer.echo("note: --normalize-scribbles is used only with --controlnet scribble", err=True)
    if negative_prompt and guidance <= 1:
        typer.echo("note: --negative-prompt is used only with --guidance above 1", err=True)
    requests = seed_requests(request, seeds)
    with interruptible(), _output_file(output, format, seeds) as file:
        for path in seed_outputs(file, requests) if seeds > 1 else [file]:
            check_output(path, fps)
        reason = None
        if backend == "auto":
            options = LoadOptions(precision=precision, device=device)
            backend, reason = one_shot_backend(Bundle.load(bundle), options, requests)
        pipeline = VideoPipeline.load(bundle, backend, precision=precision, device=device, threads=threads)
        if seeds > 1:
            generate_seeds(pipeline, requests, file, fps, reason, metadata=not no_metadata)
        else:
            _generate_one(pipeline, request, file, fps, reason, to_stdout=file is not output, metadata=not no_metadata)


def _output_file(output: Path, format: str | None, seeds: int) -> AbstractContextManager[Path]:
    """The file to write: `output`, or one whose content goes to stdout."""
    from ..runtime import InvalidRequest
    from .stdout_clip import STDOUT, clip_for_stdout

    if output != STDOUT:
        if format is not None:
            raise InvalidRequest("format", "it is for clips to stdout", "give -o -, or a file with the format's ending")
        return nullcontext(output)
    if seeds > 1:
        raise InvalidRequest("seeds", "several clips cannot go to stdout", "name a file, such as -o clip.mp4")
    return clip_for_stdout("mp4" if format is None else format)


def _generate_one(
    pipeline: "VideoPipeline",
    request: "ClipRequest",
    output: Path,
    fps: float,
    reason: str | None,
    *,
    to_stdout: bool,
    metadata: bool,
) -> None:
    from ..runtime.output.recording import Recording
    from .clip_reports import seed_told, summary
    from .progress_bar import Bar

    checked = pipeline.check(request)
    with Recording(output, fps, pipeline.metadata(checked) if metadata else {}) as recording:
        with Bar() as bar:
            clip = pipeline.run(checked, on_progress=bar.of_clip, on_frames=recording.add)
        with seed_told(clip):
            path = recording.save(clip)
    typer.echo(summary(clip, Path("stdout") if to_stdout else path, pipeline, reason), err=to_stdout)


def _keyframe(text: str) -> "Keyframe":
    from ..runtime import InvalidRequest, Keyframe

    index, separator, image = text.partition("=")
    try:
        if not (separator and image):
            raise ValueError
        return Keyframe(int(index), image)
    except ValueError:
        raise InvalidRequest("keyframe", f"{text!r} is not allowed", "give INDEX=IMAGE, such as 0=start.png") from None
