"""Draws the pictures of the README with the commands that a user would type.

    python scripts/gallery.py --runs DIR          # a quarter of an hour on two cores, most of it for the digits
    python scripts/gallery.py --runs DIR --still  # without the animations and the digits

Runs are written to DIR; finished runs in DIR are used again. The pictures are written to `.pictures`. Each clone of the
repository contains the pictures, so they are stored smaller than flowtrain writes them. MNIST is read from
FLOWTRAIN_DATA or fetched by scripts/download_mnist.py.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

PICTURES = Path(__file__).resolve().parents[1] / ".pictures"
# the name of a run directory -> its command
RUNS = {
    "moons": "flowtrain",
    "2spirals": "flowtrain experiment=2spirals",
    "rings": "flowtrain experiment=rings",
    "realnvp": "flowtrain model=realnvp data=checkerboard",
    "glow": "flowtrain experiment=mnist_glow_small",
}
# the name of an animation -> its run, and the command that writes it, with {run} and {file} for paths
ANIMATIONS = {
    "2spirals.gif": ("2spirals", "flowsample ckpt={run} animate=true n=1000 out={file}"),
    "digits.gif": ("glow", "flowsample ckpt={run} animate=true n=30 temperature=0.8 out={file}"),
}
# the name of a picture -> the figure of a run
FIGURES = {
    "transport.png": "2spirals/plots/transport.png",
    "paths.png": "moons/plots/paths.png",
    "curves.png": "moons/plots/curves.png",
    "rings.png": "rings/plots/samples.png",
    "couplings.png": "realnvp/plots/transport.png",
}


def call(command: str, **places: object) -> None:
    """Runs a console script of this environment."""
    name, *rest = command.format(**places).split()
    print(name, *rest, flush=True)
    subprocess.run([Path(sys.executable).parent / name, *rest], check=True)


def smaller(source: Path, target: Path, width: int = 1200) -> None:
    """Writes a picture `width` pixels wide, without a palette, because a palette shows steps in a density."""
    with Image.open(source) as image:
        whole = image.convert("RGB")
    whole.resize((width, round(whole.height * width / whole.width)), Image.Resampling.LANCZOS).save(
        target, optimize=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="the folder of the runs")
    parser.add_argument("--still", action="store_true", help="leave out the animations")
    arguments = parser.parse_args()
    runs = arguments.runs.absolute()
    animations = {} if arguments.still else ANIMATIONS
    needed = {source.split("/")[0] for source in FIGURES.values()} | {run for run, _ in animations.values()}
    PICTURES.mkdir(exist_ok=True)
    for name, command in RUNS.items():
        if name in needed and not (runs / name / "result.json").is_file():
            call(f"{command} hydra.run.dir={{run}}", run=runs / name)
    for name, (run, command) in animations.items():
        call(command, run=runs / run, file=runs / name)
        shutil.copyfile(runs / name, PICTURES / name)
    for name, source in FIGURES.items():
        smaller(runs / source, PICTURES / name)
    for path in sorted(PICTURES.iterdir()):
        print(f"{path.stat().st_size / 1e6:6.2f} MB  {path}")


if __name__ == "__main__":
    main()
