"""metrics.jsonl: one JSON object a line."""

import json
from pathlib import Path
from typing import Any

from flowtrain.files import to_json, write_text


class Metrics:
    """Appends rows to a file; `rows` holds them all. Begun at step s, it keeps the rows up to s, no later ones."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.rows = [row for row in read(path) if row["step"] <= step] if path.exists() else []
        write_text(path, "".join(to_json(row) + "\n" for row in self.rows))

    def write(self, **row: Any) -> None:
        self.rows.append(row)
        with self.path.open("a") as f:
            f.write(to_json(row) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line torn by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
