"""Checks of options that name the option, the value that it has, and what would be right."""

import re
from typing import Any, get_args

from .files import is_finite
from .messages import quoted


def check_positive(options: object, *names: str, or_zero: bool = False, or_word: str | None = None) -> None:
    """Raise a ValueError unless the options of these names are finite numbers above 0, or at least 0, or the word."""
    for name in names:
        value = getattr(options, name)
        if or_word is not None and value == or_word:
            continue
        if not (is_finite(value) and (value > 0 or (or_zero and value == 0))):
            word = f"; {or_word!r} is the only word that it may be" if or_word else ""
            raise ValueError(
                f"{name} must be a finite number {'of at least' if or_zero else 'above'} 0, got {value!r}{word}"
            )


def check_count(name: str, value: object, minimum: int) -> None:
    """Raise a ValueError unless the value is a whole number of at least ``minimum``."""
    if not (isinstance(value, int) and value >= minimum):
        raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value!r}")


def is_key(text: str) -> bool:
    """Whether an HTTP header can carry a text as an API key: visible ASCII, or nothing."""
    return re.fullmatch("[!-~]*", text) is not None


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise a ValueError unless the value is one of the ``choices``, a Literal."""
    if value not in (known := get_args(choices)):
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {quoted(value)}")
