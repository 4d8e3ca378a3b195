"""Shared by every test: a seed, and float64 as the default so that closed forms can be compared tightly."""

import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pytest
import torch
from runs import COMMANDS, Run

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def seeded_float64() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a command in a fresh working directory: (exit code, standard output, standard error)."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    # Hydra answers a broken config with the whole trace when told so; the commands set this themselves
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def call(command: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [command, *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            COMMANDS[command]()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call
