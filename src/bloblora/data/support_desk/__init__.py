"""The embedded data set: queries to a support desk with their intents; see the README beside this file."""

import json
from importlib.resources import files
from typing import Any

SPLITS = ("train", "validation", "test", "out_of_scope")


def support_desk(split: str = "train") -> list[dict[str, Any]]:
    """Records ``{"text", "label"}`` of a split.

    Raises:
        ValueError: ``split`` is not one of ``SPLITS``.
    """
    if split not in SPLITS:
        raise ValueError(f"support_desk: split {split!r} is not one of {', '.join(SPLITS)}")
    text = files(__package__).joinpath(f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
