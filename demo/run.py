"""`make demo`: makes out/demo.mp4 and out/demo.png from three scribbles and a prompt."""

import time
from pathlib import Path

from sparsectrl_lcm.runtime import Keyframe, VideoPipeline
from world import KEYFRAMES

PROMPT = "a yellow star moves up and right over a navy ground"


def main() -> None:
    """Makes the clip with the demo bundle of the package."""
    root = Path(__file__).parent.parent
    start = time.perf_counter()
    pipeline = VideoPipeline.load()
    keyframes = [Keyframe(index, root / f"demo/scribbles/frame_{index:02d}.png") for index in KEYFRAMES]
    clip = pipeline.generate(PROMPT, keyframes, seed=42)
    for name in ("demo.mp4", "demo.png"):
        path = clip.save(root / "out" / name, fps=8)
        print(path.relative_to(root))
    print(f"{len(clip.frames)} frames from {len(keyframes)} scribbles in {time.perf_counter() - start:.1f} s")
    print(f"Prompt: {PROMPT!r}. demo/trained/README.md describes what else the small model in the package can draw.")


if __name__ == "__main__":
    main()
