"""docs/commands.md is what the commands print."""

import runpy

import pytest

from bloblora.cli import COMMANDS
from tests.docs.blocks import ROOT

MADE = runpy.run_path(str(ROOT / "docs" / "make_commands.py"))


@pytest.mark.parametrize("command", [*COMMANDS])
def test_the_page_has_the_help_of_each_command(command, monkeypatch):
    """But for white space, which differs between versions of Python."""
    monkeypatch.setenv("COLUMNS", "100")
    page = MADE["PAGE"].read_text(encoding="utf-8")
    section = page.partition(f"\n## {command}\n\n```text\n")[2].partition("\n```\n")[0]
    again = "run python docs/make_commands.py"
    assert section.split() == MADE["printed"](command).split(), again
