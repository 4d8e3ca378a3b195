"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def cell(text: str) -> str:
    r"""Text on one line, in which nothing ends a cell.

    Example:
        >>> print(cell("a |\n b"))
        a \| b
    """
    return " ".join(text.split()).replace("|", r"\|")


def as_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A head, the line below it and rows of as many cells.

    Example:
        >>> print(as_table(["a", "b"], [["1", "2"]]))
        | a | b |
        | --- | --- |
        | 1 | 2 |
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)
