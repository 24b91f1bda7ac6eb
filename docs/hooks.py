"""What the site needs beyond MkDocs: the results that pages link to, and formulas.

Pages link to ``../results/…`` and ``../benchmarks/…``, as GitHub needs it. What is linked to is copied into the site,
with the reports' figures, and the links lose their ``../``: so ``mkdocs build --strict`` checks them as any other.

Formulas, in pages as ``$…$`` and in docstrings as Sphinx writes them, become MathML, which browsers draw without a
script, a font or a network.
"""

import ast
import html
import re
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_OUTSIDE = re.compile(r"\]\(\.\./((?:results|benchmarks|examples)[^)#]*)")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
# Browsers draw these letters as such only where they are characters of their own.
_LETTERS = {r"\mathcal N": "𝒩", r"\mathbb E": "𝔼"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to outside their folder, the reports' figures, and a list of the reports."""
    root = Path(config.config_file_path).parent
    linked = {link for file in files.documentation_pages() for link in _OUTSIDE.findall(file.content_string)}
    reports = sorted(path.relative_to(root).as_posix() for path in root.glob("results/*/*.md"))
    figures = [
        path.relative_to(root).as_posix() for kind in ("svg", "png") for path in root.glob(f"results/*/*.{kind}")
    ]
    for uri in sorted({*linked, *reports, *figures}):
        if not (root / uri).is_dir():
            files.append(File.generated(config, uri, abs_src_path=str(root / uri)))
    rows = "".join(f"- [{uri}]({uri.removeprefix('results/')})\n" for uri in reports)
    files.append(File.generated(config, "results/index.md", content=f"# Results\n\n{rows}"))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links at the copies."""
    return re.sub(_OUTSIDE, lambda match: f"]({match[1]}" + ("/index.md" if match[1] == "results" else ""), markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML."""
    return _FORMULA.sub(lambda match: _mathml(html.unescape(match[2]), match[1] == "div"), content)


class Docstrings(griffe.Extension):
    """Sphinx's formulas and literal blocks as Markdown has them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite a docstring before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = _as_markdown(obj.docstring.value)

    def on_attribute_instance(self, *, node: ast.AST | griffe.ObjectNode, attr: griffe.Attribute, **_: Any) -> None:
        """A dataclass field's help, which the command line shows too, is its docstring."""
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call) and attr.docstring is None:
            metadata = {keyword.arg: keyword.value for keyword in node.value.keywords}.get("metadata")
            if metadata is not None:
                attr.docstring = griffe.Docstring(ast.literal_eval(metadata)["help"], parent=attr)


def _as_markdown(text: str) -> str:
    block = re.compile(r"^( *)\.\. math:: (.*(?:\n\1 +\S.*)*)", re.MULTILINE)
    text = block.sub(lambda match: f"{match[1]}$$\n{match[1]}{' '.join(match[2].split())}\n{match[1]}$$", text)
    return re.sub(r":math:`([^`]+)`", r"$\1$", text).replace("::\n", ":\n")


def _mathml(tex: str, block: bool) -> str:
    for command, letter in _LETTERS.items():
        tex = tex.replace(command, letter)
    return convert(tex, display="block" if block else "inline")
