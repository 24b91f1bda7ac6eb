"""The messages that docs/troubleshooting.md explains are messages of the code."""

import ast
import re

from markdown_it import MarkdownIt

from tests.docs.blocks import ROOT


def messages() -> list[str]:
    """Every text of the source; what is filled in is "…"."""
    found = []
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_each_message_is_one_of_the_code():
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    tables = page.split("## Results are not what you expect")[1].split("\n## ", 1)[1]
    quoted = [match[1] for line in tables.splitlines() if (match := re.match(r"\| `(.+?)` \|", line))]
    assert len(quoted) > 25
    texts = messages()
    for message in quoted:
        parts = [re.escape(part.strip()) for part in message.split("…") if part.strip()]
        pattern = re.compile(r"[\s\S]*?".join(parts))
        assert any(pattern.search(text) for text in texts), f"docs/troubleshooting.md: no message {message!r} in src"


def test_the_page_has_tables():
    tokens = MarkdownIt("commonmark").enable("table").parse((ROOT / "docs/troubleshooting.md").read_text("utf-8"))
    assert sum(token.type == "table_open" for token in tokens) == 7
