"""The pictures of the README, each by the commands that a user would type.

    python scripts/gallery.py --runs DIR          # a quarter of an hour on two cores, most of it for the digits

Runs go to DIR, where those that are there already are taken as they are; what the README shows goes to `.pictures`,
still ones smaller than flowtrain writes them, since each clone of the repository carries them. MNIST is found as ever
(FLOWTRAIN_DATA, or scripts/download_mnist.py).
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

PICTURES = Path(__file__).resolve().parents[1] / ".pictures"
# by the name of its directory
RUNS = {
    "moons": "flowtrain",
    "2spirals": "flowtrain experiment=2spirals",
    "rings": "flowtrain experiment=rings",
    "realnvp": "flowtrain model=realnvp data=checkerboard",
    "glow": "flowtrain experiment=mnist_glow_small",
}
# after it, a command with {run} for its directory and {file} for what it writes, which the README shows by the name
MORE = {
    "2spirals.gif": ("2spirals", "flowsample ckpt={run} animate=true n=1000 out={file}"),
    "digits.gif": ("glow", "flowsample ckpt={run} animate=true n=30 temperature=0.8 out={file}"),
}
SHOWN = {
    "passage.png": "2spirals/plots/passage.png",
    "paths.png": "moons/plots/paths.png",
    "curves.png": "moons/plots/curves.png",
    "rings.png": "rings/plots/samples.png",
    "couplings.png": "realnvp/plots/passage.png",
}


def call(command: str, **places: object) -> None:
    """A console script of this environment."""
    name, *rest = command.format(**places).split()
    print(name, *rest, flush=True)
    subprocess.run([Path(sys.executable).parent / name, *rest], check=True)


def smaller(source: Path, target: Path, width: int = 1200) -> None:
    """A picture of that many pixels across, in all its colours: a palette would put steps into a density."""
    with Image.open(source) as image:
        whole = image.convert("RGB")
    whole.resize((width, round(whole.height * width / whole.width)), Image.Resampling.LANCZOS).save(
        target, optimize=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="where runs are, or go")
    runs = parser.parse_args().runs.absolute()
    PICTURES.mkdir(exist_ok=True)
    for name, command in RUNS.items():
        if not (runs / name / "result.json").is_file():
            call(f"{command} hydra.run.dir={{run}}", run=runs / name)
    for name, (run, command) in MORE.items():
        call(command, run=runs / run, file=runs / name)
        shutil.copyfile(runs / name, PICTURES / name)
    for name, source in SHOWN.items():
        smaller(runs / source, PICTURES / name)
    for path in sorted(PICTURES.iterdir()):
        print(f"{path.stat().st_size / 1e6:6.2f} MB  {path}")


if __name__ == "__main__":
    main()
