"""Runs of a few steps, scored by `floweval`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from runs import Run

FAST = ["model=affine", "trainer.steps=4", "trainer.batch_size=64", "trainer.plot_every=null"]


def trained(run: Run, *arguments: str) -> str:
    code, out, err = run("flowtrain", *FAST, *arguments)
    assert code == 0, err
    return str(Path(out.splitlines()[-1]).absolute())


def evaluated(run: Run, run_dir: str, *arguments: str, name: str = "eval.json") -> dict[str, Any]:
    code, _, err = run("floweval", f"ckpt={run_dir}", *arguments)
    assert code == 0, err
    content: dict[str, Any] = json.loads((Path(run_dir) / name).read_text())
    return content


def written(path: Path, header: str, rows: np.ndarray) -> Path:
    np.savetxt(path, rows, delimiter=",", header=header, comments="", fmt="%.9g")
    return path
