"""The page of the command line, docs/commands.md: `python docs/make_commands.py` after a change to an option."""

import contextlib
import io
import os
from pathlib import Path

from bloblora.cli import COMMANDS, main

PAGE = Path(__file__).with_name("commands.md")
_HEAD = """# Commands

What `bloblora COMMAND --help` prints, made by `python docs/make_commands.py`. Where a command takes a method or a task,
its options are those of the default; `bloblora train --method NAME --task NAME --help` prints others, which are also
under [Options](options.md). Every option can be in a YAML file, `--config FILE`.
"""


def page() -> str:
    """All of the page."""
    return _HEAD + "".join(f"\n## {command}\n\n```text\n{printed(command)}\n```\n" for command in COMMANDS)


def printed(command: str) -> str:
    """What a command's ``--help`` prints, 100 columns wide."""
    os.environ["COLUMNS"] = "100"
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        main([command, "--help"])
    return "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
