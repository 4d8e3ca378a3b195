"""An evaluation as a page to read: Markdown, and HTML in one file with its figures inside."""

import base64
import os
from dataclasses import dataclass
from html import escape
from pathlib import Path

from flowtrain.evaluation import Check, Evaluation
from flowtrain.utils.files import write_text
from flowtrain.utils.formatting import as_table, brief, cell, counted

Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A heading, a sentence on what stands below it, the head of a table and its rows."""

    heading: str
    words: str
    head: Row
    rows: list[Row]


def write_report(result: Evaluation, title: str, checkpoint: str, path: Path, figures: list[Path]) -> list[Path]:
    """`path` with .md and .html in place of its ending: the files written.

    Args:
        checkpoint: where the flow is from, in words.
        figures: PNGs, which the Markdown links to and the HTML holds.
    """
    rows = f"{result.rows_words}, {counted(result.n, 'row')}"
    about = f"{checkpoint}, step {result.step}, {rows}, {result.device}, {result.dtype}"
    tables = tables_of(result)
    markdown, html = path.with_suffix(".md"), path.with_suffix(".html")
    write_text(markdown, as_markdown(title, result.headline, about, tables, _links(markdown, figures)))
    write_text(html, as_html(title, result.headline, about, tables, figures))
    return [markdown, html]


def tables_of(result: Evaluation) -> list[Table]:
    """What the report says, in the order it says it."""
    unit = result.unit[0]
    return [
        Table("Numbers", "", ("", ""), list(result.rows())),
        Table(
            "Where the error comes from",
            f"In {unit}. The parts from trace to gap are measured on {counted(result.budget.rows, 'row')} drawn at "
            "random. The total is the root of the sum of the squares of sampling, trace, the larger value of solver "
            "and precision.",
            ("part", unit, "measured as"),
            budget_rows(result),
        ),
        Table(
            "Checks",
            "Is this a density, and can its NLL be trusted? Each check measures one property and names one cause. "
            "Errors of an NLL are in nats.",
            ("check", "off by", "at most", "", ""),
            [(c.label, _number(c.value), _number(c.limit), _verdict(c), c.message or "") for c in result.checks],
        ),
    ]


def budget_rows(result: Evaluation) -> list[Row]:
    """The parts of the budget, those that were measured."""
    b, (_, scale) = result.budget, result.unit
    low, high = (scale * end for end in b.interval)
    parts = [
        ("sampling", b.sampling, "standard error over the rows"),
        ("trace", b.trace, "its noise over draws, at this many rows" if b.trace else "exact, no noise"),
        ("solver", b.solver, "change when the tolerance is tightened tenfold, in float64"),
        ("solver, own estimate", b.embedded, "embedded error of the integral of the divergence"),
        ("solver, of one row", b.solver_per_row, "RMS of that change: the error of a single score; not in the total"),
        ("precision", b.precision, f"{result.dtype} beside float64"),
        ("dequantization gap", b.dequantization_gap, "lower with ten times the draws: one sided, not in the total"),
        ("total", b.total, f"standard error; 95% interval {low:.6g} to {high:.6g}"),
    ]
    return [(name, brief(scale * value), how) for name, value, how in parts if value is not None]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _verdict(check: Check) -> str:
    return {True: "passed", False: "FAILED", None: "not made"}[check.passed]


def _links(markdown: Path, figures: list[Path]) -> list[str]:
    return [Path(os.path.relpath(figure, markdown.parent)).as_posix() for figure in figures]


def as_markdown(title: str, headline: str, about: str, tables: list[Table], links: list[str]) -> str:
    """The report in Markdown, with `links` to its figures."""
    parts = [f"# {cell(title)}", f"**{cell(headline)}**", cell(about)]
    for table in tables:
        parts += [f"## {table.heading}", *([table.words] if table.words else []), as_table(table.head, table.rows)]
    parts += [f"![{Path(link).stem}](<{link}>)" for link in links]
    return "\n\n".join(parts) + "\n"


STYLE = """
html { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 3rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.headline { font-size: 1.25rem; font-weight: 600; margin: .4rem 0; }
.about, p { color: #6b6b6b; margin: .3rem 0; } .headline { color: #0072b2; }
table { border-collapse: collapse; margin-top: .6rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; } td, th { padding: .25rem 1.2rem .25rem 0; vertical-align: top; }
tr + tr td { border-top: 1px solid #e9e9e9; } td:first-child { white-space: nowrap; color: #6b6b6b; }
.FAILED { color: #d55e00; font-weight: 600; } img { width: 100%; margin-top: 1.5rem; }
"""


def as_html(title: str, headline: str, about: str, tables: list[Table], figures: list[Path]) -> str:
    """The report in HTML, with the figures, PNGs, inside it."""
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="headline">{escape(headline)}</p>',
        f'<p class="about">{escape(about)}</p>',
    ]
    for table in tables:
        parts += _html_table(table)
    for figure in figures:
        data = base64.b64encode(figure.read_bytes()).decode()
        parts.append(f'<img alt="{escape(figure.stem)}" src="data:image/png;base64,{data}">')
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


# of a notebook, whose own colours stay: it may be dark
FRAGMENT_STYLE = """
.flowtrain-evaluation h2 { font-size: 1em; margin: 1em 0 0; } .flowtrain-evaluation p { margin: .2em 0; opacity: .7; }
.flowtrain-evaluation .headline { font-weight: 600; opacity: 1; }
.flowtrain-evaluation td, .flowtrain-evaluation th { text-align: left; vertical-align: top; }
.flowtrain-evaluation .passed::before { content: "\\2713\\00a0"; }
.flowtrain-evaluation .FAILED::before { content: "\\2717\\00a0"; }
.flowtrain-evaluation .FAILED { color: #d55e00; font-weight: 600; }
"""


def as_fragment(result: Evaluation) -> str:
    """The headline and the tables of the report in HTML, to stand in another page: what a notebook shows."""
    parts = [f"<style>{FRAGMENT_STYLE}</style>", f'<p class="headline">{escape(result.headline)}</p>']
    for table in tables_of(result):
        parts += _html_table(table)
    return '<div class="flowtrain-evaluation">\n' + "\n".join(parts) + "\n</div>"


def _html_table(table: Table) -> list[str]:
    parts = [f"<h2>{escape(table.heading)}</h2>"]
    if table.words:
        parts.append(f"<p>{escape(table.words)}</p>")
    head = "".join(f"<th>{escape(word)}</th>" for word in table.head) if any(table.head) else ""
    body = "".join("<tr>" + "".join(map(_td, row)) + "</tr>" for row in table.rows)
    return [*parts, f"<table>{f'<tr>{head}</tr>' if head else ''}{body}</table>"]


def _td(words: str) -> str:
    return f'<td class="{words}">{words}</td>' if words in ("passed", "FAILED") else f"<td>{escape(words)}</td>"
