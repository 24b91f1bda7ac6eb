"""What an import loads, in a process of its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bloblora


@pytest.mark.parametrize("package", ["bloblora", "bloblora.client", "bloblora.data"])
def test_no_heavy_library(package):
    program = f"import {package}, sys; print(sorted({{'torch', 'transformers', 'peft'}} & {{*sys.modules}}))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"


def test_every_public_name_is_there():
    assert {*bloblora.__all__} <= {*dir(bloblora)}
    for name in bloblora.__all__:
        assert getattr(bloblora, name).__module__.startswith("bloblora."), name
    with pytest.raises(AttributeError, match="module 'bloblora' has no attribute 'nothing'"):
        bloblora.nothing  # noqa: B018


def test_type_checkers_see_the_same_names():
    block = next(node for node in ast.parse(Path(bloblora.__file__).read_text()).body if isinstance(node, ast.If))
    assert sorted(alias.name for line in block.body for alias in line.names) == bloblora.__all__
