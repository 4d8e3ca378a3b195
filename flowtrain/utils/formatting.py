"""Formatting of numbers with errors, of Markdown tables, and of commands to copy."""

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def cell(text: str) -> str:
    r"""Formats text for a cell of a Markdown table: on one line, with escaped bars.

    Example:
        >>> print(cell("a |\n b"))
        a \| b
    """
    return " ".join(text.split()).replace("|", r"\|")


def as_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats a Markdown table.

    Example:
        >>> print(as_table(["a", "b"], [["1", "2"]]))
        | a | b |
        | --- | --- |
        | 1 | 2 |
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def with_error(value: float, error: float) -> str:
    """Formats a value with its error, such as "2.402 +- 0.006".

    The error has one significant digit, or two if the first is a 1. The value has the same decimals. If the error is
    NaN (as for a single row) or 0 (as for an AUROC of 1), only the value is given, with four decimals.

    Example:
        >>> with_error(2.40213, 0.00581), with_error(2.40213, 0.0147)
        ('2.402 +- 0.006', '2.402 +- 0.015')
    """
    if not math.isfinite(value) or not 0 < error < math.inf:
        return f"{value:.4f}"
    places = decimals(error)
    return f"{round(value, places):.{max(0, places)}f} +- {round(error, places):.{max(0, places)}f}"


def decimals(error: float) -> int:
    """Returns the decimals to which a value with this positive error is rounded; -1 for tens, -2 for hundreds."""
    exponent = math.floor(math.log10(error))
    leading = round(error / 10**exponent, 1)
    return 1 - exponent if leading < 1.95 else -exponent


def brief(value: float) -> str:
    """Formats an error briefly, such as 3e-6, 0.02 or 12: one significant digit, or a whole number below 1e6."""
    if value == 0:
        return "0"
    size = abs(value)
    words = f"{value:.0e}" if size < 0.001 or size >= 1e6 else f"{value:.0f}" if size >= 9.5 else f"{value:.1g}"
    mantissa, e, exponent = words.partition("e")
    return f"{mantissa}e{int(exponent)}" if e else words


def option(key: str, path: Path | str) -> str:
    """Formats KEY=PATH, quoted for the shell if needed. flowtrain's commands accept a path without Hydra's quotes.

    Example:
        >>> print(option("ckpt", "runs/a b [1]"), option("ckpt", "runs/1"))
        'ckpt=runs/a b [1]' ckpt=runs/1
    """
    text = str(path)
    # without the prefix, a file named null would mean no file, and a leading ~ would mean a home directory
    here = "./" if text.lower() == "null" or text.startswith("~") else ""
    return shlex.quote(f"{key}={here}{text}")


def resume_command(run_dir: Path | str) -> str:
    """Returns the command that resumes a run."""
    return f"flowtrain {option('resume', run_dir)}"


def shown(value: Any) -> str:
    """Formats a config value for the command line.

    Example:
        >>> shown([1, None, True])
        '[1,null,true]'
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(shown, value))}]"
    return str(value)


def counted(n: int, noun: str) -> str:
    """Formats a number with a noun, in the plural unless the number is 1.

    Example:
        >>> counted(1, "column"), counted(2, "column")
        ('1 column', '2 columns')
    """
    return f"{n:,} {noun}{'s' * (n != 1)}"


def as_ranges(numbers: Sequence[int], most: int = 12) -> str:
    """Formats whole numbers with ranges for consecutive numbers: "0, 3 to 5". Gives only the first `most` ranges."""
    runs = consecutive(numbers)
    words = ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in runs[:most])
    return words if len(runs) <= most else f"{words} and more"


def consecutive(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Returns the first and the last number of each run of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], number
        else:
            runs.append((number, number))
    return runs


def flattened(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Flattens nested mappings to values by dotted keys.

    Example:
        >>> flattened({"solver": {"rtol": 1e-05}, "seed": 0})
        {'solver.rtol': 1e-05, 'seed': 0}
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flattened(value, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = value
    return found
