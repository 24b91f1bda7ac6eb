"""The table of docs/methods/index.md says what the classes declare."""

from bloblora.methods import METHODS
from tests.docs.blocks import ROOT

DECLARED = ("weight samples", "writes text", "FSDP", "leaves a trained LoRA unchanged", "--start-from")


def capabilities(name: str) -> list[str]:
    kind = METHODS[name]
    held = (not kind.deterministic, kind.writes_text, kind.sharded, kind.post_hoc, kind.starts_from_lora)
    return ["yes" if holds else "no" for holds in held]


def test_the_table_of_capabilities_is_what_methods_declare():
    page = (ROOT / "docs/methods/index.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    start = next(i for i, row in enumerate(rows) if row[1] == DECLARED[0])
    assert rows[start][1:] == [*DECLARED[:-1], f"`{DECLARED[-1]}`"]
    found = {row[0].strip("`"): row[1:] for row in rows[start + 2 :]}
    assert found == {name: capabilities(name) for name in METHODS if name in METHODS._own}


def test_each_method_has_a_page():
    assert {f"{name}.md" for name in METHODS._own} <= {file.name for file in (ROOT / "docs/methods").iterdir()}
