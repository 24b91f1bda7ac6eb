"""What an import loads, in a process of its own."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

LAZY = ("bloblora", "bloblora.serving")


@pytest.mark.parametrize("package", ["bloblora", "bloblora.client", "bloblora.data"])
def test_no_heavy_library(package):
    program = f"import {package}, sys; print(sorted({{'torch', 'transformers', 'peft'}} & {{*sys.modules}}))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"


def test_settings_need_no_http_library():
    program = "from bloblora.serving import Settings; import sys; print([m for m in ('fastapi',) if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"


@pytest.mark.parametrize("package", LAZY)
def test_every_public_name_is_there(package):
    module = importlib.import_module(package)
    assert {*module.__all__} <= {*dir(module)}
    for name in module.__all__:
        assert getattr(module, name).__module__.startswith("bloblora."), name
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


@pytest.mark.parametrize("package", LAZY)
def test_type_checkers_see_the_same_names(package):
    source = Path(importlib.import_module(package).__file__).read_text()
    (block,) = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    imported = [alias.name for line in block.body for alias in line.names]
    assert sorted(imported) == importlib.import_module(package).__all__
