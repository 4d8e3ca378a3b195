"""Shared by every test: a seed, and float64 as the default so that closed forms can be compared tightly."""

import gc
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pytest
import torch
from mirrors import Serve, serving
from runs import COMMANDS, Run

from flowtrain.data.tables import array, streaming
from flowtrain.plotting import style, transport_figures, transport_pictures
from flowtrain.utils import process, status

matplotlib.use("Agg")
DPI = style.DPI


def pytest_collection_finish() -> None:
    """What was imported stays: looking it through for garbage again and again takes a tenth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded_float64() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    # what tests compute is too small to share, and on a busy machine threads wait for each other
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Run]:
    """Runs a command in a fresh working directory: (exit code, standard output, standard error).

    One of the cores does, as above, and pictures of few dots and points: those of users take most of a short run.
    """
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(process, "cores", lambda: 1)
    # on a busy machine a command may take long enough for a line
    monkeypatch.setattr(status, "EVERY", math.inf)
    set_dots(monkeypatch, 40)
    monkeypatch.setattr(transport_figures, "RESOLUTION", 12)
    for name, few in (("COLUMNS", 2), ("ALONG", 4), ("PARTICLES", 9)):
        monkeypatch.setattr(transport_pictures, name, few)
    monkeypatch.chdir(tmp_path)
    # Hydra answers a broken config with the whole trace when told so; the commands set this themselves
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    # which a sweep sets
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    handlers = list(logging.root.handlers)

    def call(command: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [command, *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            COMMANDS[command]()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    yield call
    # Hydra's --info leaves one that writes to where standard output was
    logging.root.handlers[:] = handlers


@pytest.fixture
def full_size(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures of `run` as users get them."""
    set_dots(monkeypatch, DPI)


def set_dots(monkeypatch: pytest.MonkeyPatch, per_inch: int) -> None:
    monkeypatch.setattr(style, "DPI", per_inch)
    monkeypatch.setitem(style._RC, "figure.dpi", per_inch)


@pytest.fixture
def float32() -> None:
    """The default of users."""
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the log says reaches caplog, even once a command has turned propagation off."""
    monkeypatch.setattr(logging.getLogger("flowtrain"), "propagate", True)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of files that are not read into memory: blocks of 16 rows, windows of 8 of them, looks at 50 rows at a time."""
    monkeypatch.setattr(streaming, "BLOCK", 16 * 3 * 4)
    monkeypatch.setattr(streaming, "WINDOW", 16 * 8 * (3 * 4 + 8))
    monkeypatch.setattr(streaming, "CHUNK", 50 * 3 * 8)
    monkeypatch.setattr(array, "MOST_HELD_OUT", 60)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts mirrors, and stops them after the test."""
    monkeypatch.setenv("no_proxy", "*")
    with serving() as start:
        yield start
