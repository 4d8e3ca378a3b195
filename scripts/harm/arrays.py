"""Trains on damaged or unusual data files."""

import random
import shutil

from harm.configs import small_keys
from harm.damage import damaged
from harm.forks import try_flowtrain
from harm.odd_files import csv_of, npy_of, npz_of, odd_npy, odd_npz, odd_text, random_table
from harm.part import Part

KEYS = [
    "data.columns=[0]", "data.columns=['0:1']", "data.columns=[x0]", "data.label=0", "data.label=-1", "data.key=a",
    "data.dequantize=true", "data.levels=256", "data.levels=2", "data.standardize=false", "data.val_fraction=0.5",
    "data.val_fraction=0.99", "data.event_shape=[1,1,2]", "data.seed=3",
]  # fmt: skip


def arrays(part: Part) -> None:
    for i in part.tries():
        name, content = random_file(part.rng)
        folder = part.out / f"file{i}"
        folder.mkdir()
        (folder / name).write_bytes(content)
        if not try_flowtrain(random_use(part.rng, name), folder, part).wrong:
            shutil.rmtree(folder)


def random_file(rng: random.Random) -> tuple[str, bytes]:
    """Returns the name and content of a file that is usually damaged or unusual."""
    ending = rng.choice([".npy", ".npz", ".csv"])
    if rng.random() < 0.6:
        content = {".npy": odd_npy, ".npz": odd_npz, ".csv": odd_text}[ending](rng)
    else:
        values = random_table(rng)
        text = csv_of(values, header=rng.random() < 0.5).encode()
        whole = {".npy": npy_of(values), ".npz": npz_of(rng.random() < 0.5, a=values), ".csv": text}[ending]
        content = damaged(rng, whole)[1]
    stem = rng.choice(["file"] * 9 + ["a b", "ü", "%s{x}", "a=b"])
    return stem + rng.choice([ending] * 19 + [".CSV", ".txt", ".dat"]), content


def random_use(rng: random.Random, name: str) -> list[str]:
    """Returns a `flowtrain` command line that trains on the file."""
    model = rng.choice(["affine", "affine", "realnvp", "ffjord"])
    small = [key for key in small_keys(model, "array") if not key.startswith("data.path")]
    keys = rng.sample(KEYS, rng.choice([0, 0, 0, 1, 2]))
    return ["data=array", f"model={model}", *small, f"data.path='{name}'", *keys]
