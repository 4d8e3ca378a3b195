"""metrics.jsonl: one JSON object a line."""

import json
import math
from pathlib import Path
from typing import Any


class Metrics:
    """Appends rows to a file; `rows` holds them all. Begun at step s, it keeps the rows up to s, no later ones."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.rows = [row for row in read(path) if row["step"] <= step] if path.exists() else []
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = path.with_suffix(".tmp")
        kept.write_text("".join(_line(row) for row in self.rows))
        kept.replace(path)

    def write(self, **row: Any) -> None:
        self.rows.append(row)
        with self.path.open("a") as f:
            f.write(_line(row))


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line torn by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _line(row: dict[str, Any]) -> str:
    # JSON has no NaN
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(clean) + "\n"
