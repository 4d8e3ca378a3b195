"""metrics.jsonl: one JSON object a line."""

import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from flowtrain.flow import Density
from flowtrain.utils.files import to_json, write_text

log = logging.getLogger("flowtrain")


class Listener(Protocol):
    """Receives the same rows as `Metrics`."""

    def write(self, **row: Any) -> None:
        """Writes a row, as `Metrics.write` does."""

    def back_to(self, step: int) -> None:
        """Drops the rows of later steps."""


class Metrics:
    """Appends rows to a file and keeps them in `rows`. Rows of an existing file are kept up to `step`.

    Args:
        path: the file; None: rows are kept in memory only, as on all ranks except rank 0.
        step: the step at which the run starts.
    """

    def __init__(self, path: Path | None, step: int) -> None:
        self.path = path
        self.rows = [row for row in read(path) if row["step"] <= step] if path is not None and path.exists() else []
        self.waiting, self.failing = "", False
        self.listeners: list[Listener] = []
        if path is not None:
            write_text(path, _lines(self.rows))

    def back_to(self, step: int) -> None:
        """Drops the rows of later steps, from the file and from memory."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        for listener in self.listeners:
            listener.back_to(step)
        if self.path is None:
            return
        # the file contains a prefix of the rows; on a full disk it can be shorter than the rows that are kept
        text = _lines(self.rows).encode()
        written = min(self.path.stat().st_size, len(text))
        os.truncate(self.path, written)
        self.waiting = text[written:].decode()

    def write(self, **row: Any) -> None:
        """Appends a row. If the disk is full, the row is written together with the next row."""
        self.rows.append(row)
        for listener in self.listeners:
            listener.write(**row)
        if self.path is None:
            return
        self.waiting += to_json(row) + "\n"
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            # binary mode, because `back_to` counts bytes, and text mode changes line ends on Windows
            with self.path.open("ab") as f:
                f.write(self.waiting.encode())
        except OSError as e:
            if not self.failing:
                log.warning(
                    "%s cannot be written (%s). The rows are kept in memory until they can be written", self.path, e
                )
            self.failing = True
            with suppress(OSError):
                os.truncate(self.path, size)
            return
        self.waiting, self.failing = "", False


def in_bits(flow: Density, nll: float) -> dict[str, float]:
    """Returns an NLL in bits per dimension as a part of a row; empty unless the data are images."""
    factor = flow.bits_per_nat
    return {} if factor is None else {"bits_per_dim": factor * nll}


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(to_json(row) + "\n" for row in rows)


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics file. Damaged lines are skipped; a crash can truncate the last line."""
    rows, bad = [], 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, TypeError, KeyError, RecursionError):
            bad += 1
    if bad > 1 or (bad and lines and not _is_torn(lines[-1])):
        log.warning("%s: %d of %d lines are damaged and are skipped", path, bad, len(lines))
    return rows


def _is_torn(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False
