"""Draws the demo's three scribbles: a boat sails past a lighthouse while the sun goes down.

python demo/draw_scribbles.py
"""

from math import cos, pi, sin
from pathlib import Path

from PIL import Image, ImageDraw

SIZE, DETAIL, LINE = 512, 4, 5
FRAMES = (0, 8, 15)

Point = tuple[float, float]


def scene(progress: float) -> Image.Image:
    """The scene at `progress` 0..1, white lines on black."""
    image = Image.new("L", (SIZE * DETAIL, SIZE * DETAIL))
    draw = ImageDraw.Draw(image)

    def line(*points: Point) -> None:
        draw.line([(x * DETAIL, y * DETAIL) for x, y in points], fill=255, width=LINE * DETAIL, joint="curve")

    def arc(x: float, y: float, radius: float, start: float = 0, end: float = 360) -> None:
        box = [(x - radius) * DETAIL, (y - radius) * DETAIL, (x + radius) * DETAIL, (y + radius) * DETAIL]
        draw.arc(box, start, end, fill=255, width=LINE * DETAIL)

    horizon = 330.0
    sun_y, sun_x = 90 + 190 * progress, 150.0
    arc(sun_x, sun_y, 38)
    for ray in range(12):
        angle = ray * pi / 6
        inner, outer = (
            (sun_x + 52 * cos(angle), sun_y + 52 * sin(angle)),
            (
                sun_x + 72 * cos(angle),
                sun_y + 72 * sin(angle),
            ),
        )
        line(inner, outer)

    boat = 60 + 225 * progress
    line((0, horizon), (boat - 34, horizon))
    line((boat + 34, horizon), (370, horizon))

    line((370, 345), (385, 300), (430, 280), (480, 284), (511, 276))  # cliff
    line((400, 281), (412, 130), (452, 130), (464, 280))  # lighthouse
    line((409, 180), (455, 180))
    line((404, 230), (460, 230))
    line((404, 130), (460, 130))
    line((416, 130), (416, 98), (448, 98), (448, 130))
    line((410, 98), (432, 74), (454, 98))

    line((boat - 48, 326), (boat - 30, 356), (boat + 30, 356), (boat + 48, 326), (boat - 48, 326))  # hull
    line((boat, 326), (boat, 226))
    line((boat + 8, 236), (boat + 8, 312), (boat + 54, 312), (boat + 8, 236))
    line((boat - 8, 250), (boat - 8, 312), (boat - 40, 312), (boat - 8, 250))

    for row, shift in enumerate((20, 90, 45)):  # waves
        for left in range(shift, SIZE - 80, 150):
            x = (left + 40 * progress) % (SIZE - 80)
            arc(x + 20, 400 + 36 * row, 20, 200, 340)
            arc(x + 58, 400 + 36 * row, 20, 200, 340)
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def main() -> None:
    """Writes demo/scribbles/frame_00.png, frame_08.png and frame_15.png."""
    folder = Path(__file__).parent / "scribbles"
    folder.mkdir(exist_ok=True)
    for frame in FRAMES:
        scene(frame / FRAMES[-1]).save(folder / f"frame_{frame:02d}.png", optimize=True)


if __name__ == "__main__":
    main()
