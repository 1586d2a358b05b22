"""`sparsectrl-lcm example`."""

from pathlib import Path
from typing import Annotated

import typer

PROMPT, SEED = "a yellow star grows over a navy and teal ground", 4
KEYFRAMES = (0, 8, 15)
_SCRIBBLES = [{"index": frame, "image": f"scribbles/frame_{frame:02}.png"} for frame in KEYFRAMES]
REQUESTS = (
    {"id": "star", "prompt": "a red star grows over a grey ground", "keyframes": _SCRIBBLES, "seeds": 2},
    {"id": "yellow", "prompt": PROMPT, "keyframes": _SCRIBBLES, "seed": SEED, "fps": 4},
)


def example(
    output: Annotated[Path, typer.Option("--output", "-o", help="A new or empty folder.")] = Path("demo"),
) -> None:
    """Write files to begin with: scribbles, requests, a bundle.

    They are what the documents find in a clone: `scribbles` for --keyframe, `requests.jsonl` for `batch`, and a copy of
    the demo bundle for `build` and others.
    """
    import json
    import shutil
    from importlib.resources import files

    from .. import service
    from ..runtime.errors import OutputError, reason_of
    from ..runtime.format.bundle import demo_bundle
    from ..runtime.format.temporary_folders import complete_folder, is_vacant
    from ..runtime.operating_system import quote_argument

    pictures = files(service).joinpath("page")
    try:
        if not is_vacant(output):
            raise OutputError("output", f"{str(output)!r} exists and is not an empty folder", "name a new folder")
        with complete_folder(output) as staged:
            (staged / "scribbles").mkdir()
            for frame in KEYFRAMES:
                content = pictures.joinpath(f"example-{frame:02}.png").read_bytes()
                (staged / f"scribbles/frame_{frame:02}.png").write_bytes(content)
            lines = "".join(f"{json.dumps(line)}\n" for line in REQUESTS)
            (staged / "requests.jsonl").write_text(lines, encoding="utf-8")
            shutil.copytree(demo_bundle(), staged / "bundle", ignore=shutil.ignore_patterns("engines"))
    except OutputError:
        raise
    except OSError as error:
        reason = f"{str(output)!r} cannot be written: {reason_of(error)}"
        raise OutputError("output", reason, "name a new folder") from None
    keyframes = [f"--keyframe={frame}={output / f'scribbles/frame_{frame:02}.png'}" for frame in KEYFRAMES]
    clip = ["generate", "--prompt", PROMPT, *keyframes, "--seed", str(SEED), "-o", "star.mp4"]
    typer.echo(f"{output}: scribbles, requests.jsonl and bundle; now run")
    for words in (clip, ["batch", str(output / "requests.jsonl"), "-o", "clips"]):
        typer.echo(" ".join(["sparsectrl-lcm", *map(quote_argument, words)]))
