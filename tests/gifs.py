"""What is in an animation."""

from pathlib import Path
from typing import NamedTuple

from PIL import Image


class Gif(NamedTuple):
    """Its frames, how wide they are in pixels, and for how many milliseconds each is shown."""

    n_frames: int
    width: int
    durations: list[int]
    loops: int


def gif_of(path: Path) -> Gif:
    with Image.open(path) as image:
        durations = []
        n = getattr(image, "n_frames", 1)
        for k in range(n):
            image.seek(k)
            durations.append(image.info["duration"])
        return Gif(n, image.width, durations, image.info.get("loop", -1))
