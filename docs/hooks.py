"""What the site needs beyond MkDocs: the results that pages link to, tables of options, and formulas.

Pages link to ``../results/…`` and ``../benchmarks/…``, as GitHub needs it. What is linked to is copied into the site,
with the reports' figures, and the links lose one ``../``: so ``mkdocs build --strict`` checks them like any other.

A line ``<!-- options: method blob -->`` becomes a table of the options of that class, made from its dataclass fields,
and ``<!-- versions -->`` one of the packages in pyproject.toml and constraints.txt. On GitHub these are invisible
comments, so the text beside them says what has the same.

Formulas, in pages as ``$…$`` and in docstrings as Sphinx writes them, become MathML, which browsers draw without a
script, a font or a network.
"""

import ast
import dataclasses
import html
import importlib
import logging
import pydoc
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_OUTSIDE = re.compile(r"\]\(((?:\.\./)*)\.\./((?:results|benchmarks|examples)[^)#]*)")
_OPTIONS = re.compile(r"^<!-- options: (.+?) -->$", re.MULTILINE)
_VERSIONS = "<!-- versions -->"
_OPTION_CLASSES = {
    "method": "bloblora.methods:METHODS",
    "task": "bloblora.tasks:TASKS",
    "prior": "bloblora.posterior:PRIORS",
    "run": "bloblora.runs:RunConfig",
    "reading": "bloblora.data:ReadingOptions",
    "training": "bloblora.training:Objective",
}
_log = logging.getLogger("mkdocs.hooks")  # a warning fails the strict build
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
# Browsers draw these letters as such only where they are characters of their own.
_LETTERS = {r"\mathcal N": "𝒩", r"\mathbb E": "𝔼"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to outside their folder, the reports' figures, and a list of the reports."""
    root = Path(config.config_file_path).parent
    linked = {link for file in files.documentation_pages() for _, link in _OUTSIDE.findall(file.content_string)}
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


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Point links at the copies, and fill in the tables of options and versions."""
    markdown = _OPTIONS.sub(lambda match: options_table(match[1]), markdown)
    if _VERSIONS in markdown:
        markdown = markdown.replace(_VERSIONS, versions_table(Path(config.config_file_path).parent))
    return _OUTSIDE.sub(
        lambda match: f"]({match[1]}{match[2]}" + ("/index.md" if match[2] == "results" else ""), markdown
    )


def versions_table(root: Path) -> str:
    """What each package must be at least, for what it is needed, and with which version the tests were run."""
    needed = (root / "pyproject.toml").read_text(encoding="utf-8").partition("\ndependencies = [")[2]
    run = dict(re.findall(r"^([\w-]+)==(\S+)", (root / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    rows, extra = ["| package | at least | for | tests were run with |", "|---|---|---|---|"], "everything"
    for line in needed.partition("\n[project.scripts]")[0].splitlines():
        if group := re.match(r"(\w+) = \[", line):
            extra = f"`bloblora[{group[1]}]`"
        if extra != "`bloblora[dev]`":
            for name, least in re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\d.]+)"', line):
                rows.append(f"| {name} | {least} | {extra} | {run.get(name, '–')} |")
    return "\n".join(rows)


def options_table(what: str) -> str:
    """The options of a class as a Markdown table.

    Args:
        what: ``run``, ``reading``, ``training``, or ``method``, ``task`` or ``prior`` and a name.
    """
    group, _, name = what.partition(" ")
    module, attribute = _OPTION_CLASSES[group].split(":")
    kind = getattr(importlib.import_module(module), attribute)
    kind = kind[name] if name else kind
    hints = get_type_hints(kind)
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for option in dataclasses.fields(kind):
        if option.name == "pad_token_id":  # of every task, from the tokenizer
            continue
        text = option.metadata.get("help", "")
        if not text:
            _log.warning("%s.%s has no metadata['help'], and so no meaning in the docs", kind.__name__, option.name)
        choices = _choices(hints[option.name])
        if choices and not all(f"`{choice}`" in text for choice in choices):
            text = f"One of {', '.join(f'`{choice}`' for choice in choices)}. {text}"
        rows.append(f"| `{option.name}` | {_default(option)} | {text.replace('|', '&#124;')} |")
    return "\n".join(rows) if len(rows) > 2 else "It has no options of its own."


def _choices(hint: Any) -> list[Any]:
    """The values of a ``Literal``, also where None is allowed."""
    if get_origin(hint) is Literal:
        return [*get_args(hint)]
    return [choice for part in get_args(hint) for choice in _choices(part)]


def _default(option: dataclasses.Field[Any]) -> str:
    if option.default is not dataclasses.MISSING:
        return "none" if option.default is None else f"`{option.default}`"
    return "required" if option.default_factory is dataclasses.MISSING else "none"


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
        if attr.docstring is not None or attr.parent is None or not attr.parent.is_class:
            return
        owner: Any = pydoc.locate(attr.parent.path)
        for option in dataclasses.fields(owner) if dataclasses.is_dataclass(owner) else ():
            if option.name == attr.name and "help" in option.metadata:
                attr.docstring = griffe.Docstring(option.metadata["help"], parent=attr)


def _as_markdown(text: str) -> str:
    block = re.compile(r"^( *)\.\. math:: (.*(?:\n\1 +\S.*)*)", re.MULTILINE)
    text = block.sub(lambda match: f"{match[1]}$$\n{match[1]}{' '.join(match[2].split())}\n{match[1]}$$", text)
    return re.sub(r":math:`([^`]+)`", r"$\1$", text).replace("::\n", ":\n")


def _mathml(tex: str, block: bool) -> str:
    for command, letter in _LETTERS.items():
        tex = tex.replace(command, letter)
    return convert(tex, display="block" if block else "inline")
