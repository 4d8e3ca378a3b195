"""Standard error as a terminal has it, and what a terminal shows of what was written to it."""

import io


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> str:
        """The lines that are left to be seen: after a carriage return, text is written over what stood there."""
        lines = []
        for line in self.getvalue().split("\n"):
            seen = ""
            for text in line.split("\r"):
                seen = text + seen[len(text) :]
            lines.append(seen.rstrip())
        return "\n".join(lines)
