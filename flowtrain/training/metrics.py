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
        kept.write_text("".join(to_json(row) + "\n" for row in self.rows))
        kept.replace(path)

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


def to_json(content: dict[str, Any], indent: int | None = None) -> str:
    """JSON with null for what is not a finite number, which JSON has no word for."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}
    return json.dumps(clean, indent=indent, allow_nan=False)
