"""What TensorBoard reads of a run, and what its files hold."""

import json
from pathlib import Path

import numpy as np
import pytest

from flowtrain.training import tensorboard

EventAccumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
LOGGER = "logger=[jsonl,tensorboard]"

SMALL = [
    "model=affine", "trainer.steps=6", "trainer.batch_size=16", "trainer.log_every=1", "trainer.val_every=2",
    "trainer.plot_every=2", "data.n_val=32", "data.n_test=32",
]  # fmt: skip

Scalars = dict[tuple[str, int], float]
Pictures = dict[tuple[str, int], bytes]


def shown(run_dir: Path) -> tuple[Scalars, Pictures]:
    """What TensorBoard reads, by tag and step; nothing is there twice."""
    read = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    read.Reload()
    scalars = [((tag, e.step), e.value) for tag in read.Tags()["scalars"] for e in read.Scalars(tag)]
    images = [((tag, e.step), e.encoded_image_string) for tag in read.Tags()["images"] for e in read.Images(tag)]
    assert len(dict(scalars)) == len(scalars)
    assert len(dict(images)) == len(images)
    return dict(scalars), dict(images)


def written(run_dir: Path) -> Scalars:
    """The same of metrics.jsonl and result.json."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    if (run_dir / "result.json").exists():
        result = json.loads((run_dir / "result.json").read_text())
        rows.append({"step": result["steps"], "split": "test", **{k: result[k] for k in tensorboard.RESULT}})
    return {
        (f"{row['split']}/{key}", row["step"]): float(np.float32(value))
        for row in rows
        for key, value in row.items()
        if key not in ("step", "split") and value is not None
    }


def drawn(run_dir: Path, steps: int) -> Pictures:
    """The same of plots/."""
    return {
        (f"final/{p.stem}", steps) if "_" not in p.stem else ("samples", int(p.stem[-6:])): p.read_bytes()
        for p in (run_dir / "plots").glob("*.png")
    }
