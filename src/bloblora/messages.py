"""Values and texts of others in messages: short, and with nothing in them that a terminal would obey."""

from typing import Any

LONGEST = 200
"""Characters of a value that a message repeats."""
LONGEST_LINE = 2_000
"""Characters of a line that is shown."""


def quoted(value: Any) -> str:
    """A value as Python writes it, cut after `LONGEST` characters, with control characters escaped."""
    return repr(_cut(value)) if isinstance(value, str) else _cut(repr(value))


def shortened(text: str) -> str:
    """A text on one line, likewise: a name from a file, or another library's message."""
    return escaped(_cut(" ".join(text.split())))


def escaped(text: str) -> str:
    """A text of which all but line ends and what is printed is escaped: no colours, no moves of the cursor.

    Lines are cut after `LONGEST_LINE` characters.
    """
    text = "\n".join(_cut(line, LONGEST_LINE) for line in text.split("\n"))
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _cut(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
