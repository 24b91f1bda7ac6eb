"""What commands print and write."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ... import runs


def dumped(content: Any) -> str:
    """JSON as people read it."""
    return json.dumps(content, indent=2, ensure_ascii=False)


def print_json(content: Any) -> None:
    """Print JSON."""
    print(dumped(content))


@contextmanager
def writing(output: str | None) -> Iterator[TextIO]:
    """Standard output, or a file that appears when it is complete."""
    if output is None:
        yield sys.stdout
        return
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as handle:
            yield handle
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def named(source: str | None) -> Iterator[None]:
    """Say which file an error is about."""
    try:
        yield
    except runs.RunError as error:
        raise runs.RunError(f"{source}: {error}") from error
