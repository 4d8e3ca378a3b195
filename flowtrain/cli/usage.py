"""Layout of help texts, and the help of the commands that have options instead of a config."""

import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# a row of a table with two columns
Row = tuple[str, str]

# the limits of the width in characters, and the width if standard output is not a terminal
NARROWEST, WIDEST, WITHOUT_TERMINAL = 80, 120, 100
# the column at which the descriptions of options begin
OPTION_COLUMN = 16

# descriptions of options that several commands have
RUN_TEXT = (
    "A run directory (its best checkpoint) or a .pt file. ckpt= may be left out. A sweep directory, or a list of runs "
    "with the same data as in ckpt=[RUN1,RUN2], is an ensemble: p(x) is the weighted mean of the densities of the "
    "runs"
)
WEIGHTS_TEXT = (
    "Weights of the members of an ensemble: equal, or numbers as in [0.3,0.7]. Default: the weights with the highest "
    "likelihood of the validation rows"
)
DEVICE_TEXT = "auto (default), cpu, cuda or cuda:0"
TRUST_TEXT = "Packages besides flowtrain that the checkpoint may use. Their code is run. Example: trust=[mypkg]"


def width() -> int:
    """Returns the width of a help text in characters: the width of the terminal, from 80 to 120."""
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else WITHOUT_TERMINAL
    return min(max(columns, NARROWEST), WIDEST)


def paragraph(text: str, indent: int = 2) -> list[str]:
    """Returns the lines of a wrapped paragraph."""
    blanks = " " * indent
    return textwrap.wrap(text, width(), initial_indent=blanks, subsequent_indent=blanks, break_on_hyphens=False)


def table(rows: Sequence[Row], column: int, indent: int = 2) -> list[str]:
    """Returns the lines of a table with two columns, the second one wrapped.

    If the first cell is too long, the second cell begins on the next line.

    Args:
        column: the column at which the second cells begin.
    """
    lines: list[str] = []
    for left, right in rows:
        head = " " * indent + left
        wrapped = textwrap.wrap(right, width() - column, break_on_hyphens=False) or [""]
        if len(head) > column - 2:
            lines.append(head)
            head = ""
        first, *others = wrapped
        lines += [f"{head:{column}}{first}".rstrip(), *(" " * column + line for line in others)]
    return [line for line in lines if line]


def joined(blocks: Sequence[Sequence[str]]) -> str:
    """Returns the text of blocks of lines, with an empty line between two blocks."""
    return "\n\n".join("\n".join(block) for block in blocks if block)


@dataclass(frozen=True)
class Usage:
    """The help of a command with options KEY=VALUE.

    Attributes:
        name: the command, such as "floweval".
        summary: what the command does, in one line.
        arguments: the forms of its arguments.
        examples: command lines and what they do.
        options: descriptions of the options, by their keys. The first sentence is the description in the short help.
        notes: paragraphs at the end of the full help.
        more: rows about further topics of --help.
    """

    name: str
    summary: str
    arguments: Sequence[str]
    examples: Sequence[Row]
    options: Mapping[str, str]
    notes: Sequence[str] = ()
    more: Sequence[Row] = field(default_factory=tuple)

    def short(self) -> str:
        """Returns the text of --help."""
        first = [(key, first_sentence(text)) for key, text in self.options.items()]
        topics = [
            (f"{self.name} --help all", "all details"),
            (f"{self.name} --help KEY", f"one option, as in {self.name} --help {next(iter(self.options))}"),
            *self.more,
        ]
        return joined([*self._head(), ["Options", *table(first, OPTION_COLUMN)], ["More", *table(topics, 28)]])

    def full(self) -> str:
        """Returns the text of --help all."""
        options = ["Options", *table([*self.options.items()], OPTION_COLUMN)]
        return joined([*self._head(), options, *(paragraph(note, indent=0) for note in self.notes)])

    def option(self, key: str) -> str:
        """Returns the text of --help KEY for an option."""
        return "\n".join(table([(key, self.options[key])], OPTION_COLUMN))

    def _head(self) -> list[list[str]]:
        lines = [f"{self.name} {arguments}".rstrip() for arguments in self.arguments]
        usage = [f"{'Usage: ' if i == 0 else '       '}{line}" for i, line in enumerate(lines)]
        longest = max((len(command) for command, _ in self.examples), default=0)
        return [[f"{self.name}: {self.summary}"], usage, ["Examples", *table(self.examples, longest + 5)]]


def first_sentence(text: str) -> str:
    """Returns the text up to the first full stop that a capital letter follows, without the full stop.

    Example:
        >>> first_sentence("The split. Default: test"), first_sentence("log p(x), e.g. of rows")
        ('The split', 'log p(x), e.g. of rows')
    """
    for end in range(len(text) - 2):
        if text[end : end + 2] == ". " and text[end + 2].isupper():
            return text[:end]
    return text.removesuffix(".")
