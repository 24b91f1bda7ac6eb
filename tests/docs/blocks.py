"""The code blocks of a page, as CommonMark has them."""

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = sorted(str(path.relative_to(ROOT)) for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
SHOWN_ONLY = ("text", "ini", "dockerfile")
_MARK = re.compile(r"<!--\s*not run(?:: *(.*?))?\s*-->")


@dataclass(frozen=True)
class Block:
    """A code block: its language, where it is, and why it isn't run, if it isn't."""

    page: str
    line: int
    language: str
    code: str
    not_run: str | None

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    """The page's blocks in order; ``not_run`` is the reason in a mark right before the block, "" where it has none."""
    blocks, marked = [], None
    for token in MarkdownIt("commonmark").parse((ROOT / page).read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            language = token.info.split()[0] if token.info else ""
            blocks.append(Block(page, token.map[0] + 1, language, token.content, marked))
        mark = _MARK.fullmatch(token.content.strip()) if token.type == "html_block" else None
        marked = (mark[1] or "") if mark else None
    return blocks
