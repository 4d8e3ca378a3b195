"""metrics.jsonl: one JSON object a line."""

import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowtrain.files import to_json, write_text

log = logging.getLogger("flowtrain")


class Metrics:
    """Appends rows to a file; `rows` holds them all. Begun at step s, it keeps the rows up to s, no later ones.

    Args:
        writes: whether to touch the file: of several processes, one does.
    """

    def __init__(self, path: Path, step: int, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.rows = [row for row in read(path) if row["step"] <= step] if writes and path.exists() else []
        self.waiting, self.failing = "", False
        if writes:
            write_text(path, "".join(to_json(row) + "\n" for row in self.rows))

    def write(self, **row: Any) -> None:
        """Appends a row; what cannot be written, as on a full disk, is tried again with the next one."""
        self.rows.append(row)
        if not self.writes:
            return
        self.waiting += to_json(row) + "\n"
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a") as f:
                f.write(self.waiting)
        except OSError as e:
            if not self.failing:
                log.warning("%s cannot be written (%s): its rows are kept until it can", self.path, e)
            self.failing = True
            with suppress(OSError):
                os.truncate(self.path, size)
            return
        self.waiting, self.failing = "", False


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line torn by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
