"""Whether an answer is right, by a reference, and whether two answers mean the same."""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ..messages import quoted
from .asking import Entailment
from .text import Agree, same_text

Matcher = Callable[[str, str], bool]
"""Whether an answer is the reference; a ValueError where the reference is none for it."""
_NUMBER = re.compile(
    r"(?<![\w.])[-+−]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|(?<![\w.])[-+−]?\.\d+"
)


def exact(answer: str, reference: str) -> bool:
    """Whether the two are equal but for outer white space."""
    return answer.strip() == reference.strip()


def numeric(answer: str, reference: str) -> bool:
    """Whether the answer's last number is the reference's, to 9 digits; 1,234.5 and -2e3 are numbers.

    Raises:
        ValueError: the reference has no number.
    """
    wanted = _last_number(reference)
    if wanted is None:
        raise ValueError(f"{quoted(reference)} has no number in it; take another matcher than numeric")
    found = _last_number(answer)
    return found is not None and math.isclose(found, wanted, rel_tol=1e-9, abs_tol=1e-12)


MATCHERS: Mapping[str, Matcher] = {"exact": exact, "normalized": same_text, "numeric": numeric}


def find_matcher(name: str) -> Matcher:
    """One of `MATCHERS`, or a user's function of answer and reference: ``module:function`` or ``file.py:function``.

    Raises:
        ValueError: there is none.
    """
    if name in MATCHERS:
        return MATCHERS[name]
    place, _, function = name.rpartition(":")
    known = f"matcher must be {', '.join(MATCHERS)}, module:function or file.py:function, got {quoted(name)}"
    if not place or not function:
        raise ValueError(known)
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except Exception as error:  # a user's file may raise anything
        raise ValueError(f"{known}: {type(error).__name__}: {error}") from error
    if not callable(given := getattr(module, function, None)):
        raise ValueError(f"{known}: it has no function {quoted(function)}")

    def matches(answer: str, reference: str) -> bool:
        found = given(answer, reference)
        if not isinstance(found, bool | np.bool_):  # a similarity of 0.3 would count as right
            raise TypeError(f"matcher {name} gave {quoted(found)}; it must give True or False")
        return bool(found)

    return matches


def find_agree(name: str) -> Agree:
    """Whether two answers mean the same: a matcher, as `find_matcher` takes it, or ``nli:MODEL``, an `Entailment`.

    Answers that a matcher can't use, as ``numeric`` one without a number, agree with none but themselves.

    Raises:
        ValueError: there is none.
        ModelError: the model can't be loaded, or says nothing of entailment.
    """
    kind, _, model = name.partition(":")
    if kind == "nli" and model:
        return Entailment(model)
    try:
        matcher = find_matcher(name)
    except ValueError as error:
        raise ValueError(f"agree: {error}, or nli:MODEL") from error
    try:
        matcher("one", "another")
    except TypeError as error:  # a user's function that isn't one
        raise ValueError(f"agree: {error}") from error
    except ValueError:  # as of texts without a number
        pass

    def agree(first: str, second: str) -> bool:
        try:
            return first == second or matcher(first, second)
        except ValueError:
            return False

    return agree


def _last_number(text: str) -> float | None:
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "").replace("−", "-")) if numbers else None
