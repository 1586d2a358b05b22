"""Draws the demo's three scribbles: a star that grows.

python demo/draw_scribbles.py
"""

from pathlib import Path

from drawing import DETAIL, scribble
from PIL import Image
from run import PROMPT
from world import KEYFRAMES, Scene, Shape

SCENE = Scene(
    motion="grows",
    caption=PROMPT,
    shapes=(Shape("star", ("yellow", "yellow"), ((58.0, 72.0), (68.0, 60.0)), (14.0, 29.0), (0.0, 0.0)),),
    grounds=("navy", "teal"),
)


def main() -> None:
    """Writes demo/scribbles/frame_00.png, frame_08.png and frame_15.png, 512x512."""
    folder = Path(__file__).parent / "scribbles"
    folder.mkdir(exist_ok=True)
    for frame in KEYFRAMES:
        Image.fromarray(scribble(SCENE, frame, DETAIL)).save(folder / f"frame_{frame:02d}.png", optimize=True)


if __name__ == "__main__":
    main()
