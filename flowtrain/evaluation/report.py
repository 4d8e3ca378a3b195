"""The report of an evaluation, in Markdown, and in HTML as one file that contains its figures."""

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from flowtrain.evaluation.result import Check, ContextBin, Evaluation, p_words
from flowtrain.evaluation.target_result import TargetEvaluation
from flowtrain.utils.files import write_text
from flowtrain.utils.formatting import as_table, brief, cell, counted, with_error

Row = tuple[str, ...]
Result = Evaluation | TargetEvaluation
# figures that HTML can contain, by their endings, the preferred kind first
EMBEDDED = {".png": "image/png", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Attributes:
        heading: the heading above it.
        words: a sentence about the content of the table; may be empty.
        head: the names of its columns.
        rows: its cells.
    """

    heading: str
    words: str
    head: Row
    rows: list[Row]


def write_report(
    result: Result,
    title: str,
    checkpoint: str,
    path: Path,
    figures: Sequence[Path],
    provenance: Sequence[tuple[str, str]] = (),
) -> list[Path]:
    """Writes the report as Markdown and as HTML, to `path` with the endings .md and .html.

    Args:
        checkpoint: the file of the flow.
        figures: the files of figures. If a figure has several formats, the report uses PNG before SVG and PDF. The
            HTML contains PNG and SVG files, and links to PDF files.
        provenance: names and values that say how the flow was trained and evaluated.

    Returns:
        The two files.
    """
    rows = counted(result.n, "sample")
    if isinstance(result, Evaluation):
        rows = f"{result.rows_words}, {counted(result.n, 'row')}"
    about = f"{checkpoint}, step {result.step}, {rows}, {result.device}, {result.dtype}"
    tables = tables_of(result)
    if provenance:
        tables.append(Table("Provenance", "", ("", ""), list(provenance)))
    shown = chosen_figures(figures)
    markdown, html = path.with_suffix(".md"), path.with_suffix(".html")
    write_text(markdown, as_markdown(title, result.headline, about, tables, _links(markdown, shown)))
    write_text(html, as_html(title, result.headline, about, tables, shown, _links(html, shown)))
    return [markdown, html]


def chosen_figures(figures: Sequence[Path]) -> list[Path]:
    """Returns one file of each figure, PNG before SVG before other formats.

    Example:
        >>> [str(path) for path in chosen_figures([Path("a.pdf"), Path("a.png"), Path("b.pdf")])]
        ['a.png', 'b.pdf']
    """
    order = [*EMBEDDED]
    found: dict[Path, Path] = {}
    for path in sorted(figures, key=lambda file: order.index(file.suffix) if file.suffix in order else len(order)):
        found.setdefault(path.with_suffix(""), path)
    return [found[name] for name in dict.fromkeys(path.with_suffix("") for path in figures)]


def tables_of(result: Result) -> list[Table]:
    """Returns the tables of the report: the numbers, the error budget and the checks."""
    if isinstance(result, TargetEvaluation):
        return [
            Table("Results", "", ("", ""), list(result.rows())),
            Table(
                "Error budget of log Z",
                f"In nats. Solver and precision are measured on {counted(result.budget.rows, 'sample')}. The total is "
                "the root of the sum of the squares.",
                ("part", "nats", "measured as"),
                log_z_rows(result),
            ),
            checks_table("weights can be trusted", result.checks),
        ]
    unit = result.unit[0]
    tables = [
        Table("Results", "", ("", ""), list(result.rows())),
        Table(
            "Error budget",
            f"In {unit}. The parts from trace to dequantization gap are measured on "
            f"{counted(result.budget.rows, 'row')} drawn at random. The total is the root of the sum of the squares of "
            "sampling, trace, the larger value of solver and precision.",
            ("part", unit, "measured as"),
            budget_rows(result),
        ),
        checks_table("NLL can be trusted. Errors of an NLL are in nats", result.checks),
    ]
    if result.calibration.by_context:
        tables.append(
            Table(
                "Calibration by context",
                f"Rows with similar contexts. NLL is in {unit}. KS is the largest Kolmogorov-Smirnov distance of a "
                "transform. p-values are corrected for the number of transforms and of bins.",
                ("column", "context", "rows", "NLL", "KS", "p"),
                [context_row(result, one) for one in result.calibration.by_context],
            )
        )
    return tables


def checks_table(trusted: str, checks: Sequence[Check]) -> Table:
    """Returns the table of checks.

    Args:
        trusted: the end of the sentence "The checks test whether the flow is a density and whether its ...".
    """
    return Table(
        "Checks",
        f"The checks test whether the flow is a density and whether its {trusted}.",
        ("check", "value", "limit", "", ""),
        [(c.label, _number(c.value), _number(c.limit), _verdict(c), c.message or "") for c in checks],
    )


def log_z_rows(result: TargetEvaluation) -> list[Row]:
    """Returns the parts of the error of log Z: name, size and method."""
    b = result.budget
    low, high = b.interval
    parts = [
        ("sampling", b.sampling, "standard error over the samples"),
        ("tail", b.tail, "share of Z from weights above the largest sampled weight"),
        ("solver", b.solver if result.solver else None, "change by a tight solve in float64 from the same base points"),
        ("precision", b.precision, f"change from {result.dtype} to float64"),
        ("total", b.total, f"95% interval {low:.6g} to {high:.6g}"),
    ]
    return [(name, brief(value), how) for name, value, how in parts if value is not None]


def context_row(result: Evaluation, one: ContextBin) -> Row:
    """Returns the cells of a bin in the table of the calibration by context."""
    _, scale = result.unit
    nll = with_error(scale * one.nll, scale * one.nll_stderr)
    return (
        one.column,
        one.words,
        f"{one.n:,}",
        nll,
        f"{one.ks:.3f} ({one.worst})",
        p_words(one.p_value).removeprefix("= "),
    )


def budget_rows(result: Evaluation) -> list[Row]:
    """Returns the measured parts of the error budget: name, size and method."""
    b, (_, scale) = result.budget, result.unit
    low, high = (scale * end for end in b.interval)
    parts = [
        ("sampling", b.sampling, "standard error over the rows"),
        ("trace", b.trace, "standard error from the noise of the estimate" if b.trace else "exact, no noise"),
        ("solver", b.solver, "change when the tolerance is tightened tenfold, in float64"),
        ("solver, own estimate", b.embedded, "embedded error estimate of the integral of the divergence"),
        (
            "solver, of one row",
            b.solver_per_row,
            "RMS of that change over rows: the error of a single log p; not in the total",
        ),
        ("precision", b.precision, f"change from {result.dtype} to float64"),
        (
            "dequantization gap",
            b.dequantization_gap,
            "decrease with ten times as many noise draws; one-sided, not in the total",
        ),
        ("total", b.total, f"standard error; 95% interval {low:.6g} to {high:.6g}"),
    ]
    return [(name, brief(scale * value), how) for name, value, how in parts if value is not None]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _verdict(check: Check) -> str:
    return {True: "passed", False: "FAILED", None: "not made"}[check.passed]


def _links(page: Path, figures: Sequence[Path]) -> list[str]:
    """Returns the figures by their paths relative to the page."""
    return [Path(os.path.relpath(figure, page.parent)).as_posix() for figure in figures]


def as_markdown(title: str, headline: str, about: str, tables: Sequence[Table], links: Sequence[str]) -> str:
    """Returns the report in Markdown, with links to its figures."""
    parts = [f"# {cell(title)}", f"**{cell(headline)}**", cell(about)]
    for table in tables:
        parts += [f"## {table.heading}", *([table.words] if table.words else []), as_table(table.head, table.rows)]
    if links:
        parts.append("## Figures")
    for link in links:
        path = Path(link)
        # other formats are not images in Markdown
        parts.append(f"{'!' if path.suffix in EMBEDDED else ''}[{path.stem}](<{link}>)")
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
.FAILED { color: #d55e00; font-weight: 600; } figure { margin: 1.5rem 0; } img { width: 100%; }
figcaption { color: #6b6b6b; font-size: .9rem; }
"""


def as_html(
    title: str, headline: str, about: str, tables: Sequence[Table], figures: Sequence[Path], links: Sequence[str]
) -> str:
    """Returns the report in HTML as one file: PNG and SVG figures are embedded, others are links."""
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="headline">{escape(headline)}</p>',
        f'<p class="about">{escape(about)}</p>',
    ]
    for table in tables:
        parts += _html_table(table)
    if figures:
        parts.append("<h2>Figures</h2>")
    for figure, link in zip(figures, links, strict=True):
        name = escape(figure.stem)
        if figure.suffix in EMBEDDED:
            data = base64.b64encode(figure.read_bytes()).decode()
            image = f'<img alt="{name}" src="data:{EMBEDDED[figure.suffix]};base64,{data}">'
            parts.append(f"<figure>{image}<figcaption>{name}</figcaption></figure>")
        else:
            parts.append(f'<p><a href="{escape(link)}">{name}</a></p>')
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{viewport}<title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


# a notebook keeps its own colours, because it may be dark
FRAGMENT_STYLE = """
.flowtrain-evaluation h2 { font-size: 1em; margin: 1em 0 0; } .flowtrain-evaluation p { margin: .2em 0; opacity: .7; }
.flowtrain-evaluation .headline { font-weight: 600; opacity: 1; }
.flowtrain-evaluation td, .flowtrain-evaluation th { text-align: left; vertical-align: top; }
.flowtrain-evaluation .passed::before { content: "\\2713\\00a0"; }
.flowtrain-evaluation .FAILED::before { content: "\\2717\\00a0"; }
.flowtrain-evaluation .FAILED { color: #d55e00; font-weight: 600; }
"""


def as_fragment(result: Result) -> str:
    """Returns the headline and the tables of the report in HTML, for a page such as a notebook."""
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
