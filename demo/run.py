"""`make demo`: makes out/demo.mp4, out/demo.gif and out/demo.png from three scribbles and a prompt."""

import time
from pathlib import Path

from sparsectrl_lcm.runtime import ClipRequest, Keyframe, VideoPipeline
from world import KEYFRAMES

ROOT = Path(__file__).parent.parent
PROMPT, SEED = "a yellow star grows over a navy and teal ground", 4


def request() -> ClipRequest:
    """The request of the demo."""
    keyframes = [Keyframe(index, ROOT / f"demo/scribbles/frame_{index:02d}.png") for index in KEYFRAMES]
    return ClipRequest(PROMPT, keyframes, seed=SEED)


def main() -> None:
    """Makes the clip with the demo bundle of the package."""
    start = time.perf_counter()
    clip = VideoPipeline.load().run(request())
    for name in ("demo.mp4", "demo.gif", "demo.png"):
        path = clip.save(ROOT / "out" / name, fps=8)
        print(path.relative_to(ROOT))
    print(f"{len(clip.frames)} frames from {len(clip.keyframes)} scribbles in {time.perf_counter() - start:.1f} s")
    print(f"Prompt: {PROMPT!r}. demo/trained/README.md describes what else the small model in the package can draw.")


if __name__ == "__main__":
    main()
