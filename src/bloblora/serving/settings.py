"""What a server allows, and the keys that open it."""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path

from ..runs import PredictionOptions, RunError


@dataclass(frozen=True, kw_only=True)
class Settings(PredictionOptions):
    """Limits and defaults of a server, whose ``samples`` are those of a request that names none.

    Raises:
        RunError: one is out of its range; the message lists all.
    """

    batch_size: int = field(default=16, metadata={"help": "Inputs a forward pass; requests share it."})
    max_samples: int = field(default=100, metadata={"help": "Largest N that a request may name."})
    max_wait_ms: float = field(
        default=5.0, metadata={"help": "How long an input waits for others to share its forward pass, milliseconds."}
    )
    queue: int = field(
        default=256, metadata={"help": "Most inputs that wait; beyond it requests get 429 and Retry-After."}
    )
    max_inputs: int = field(default=64, metadata={"help": "Most inputs a request."})
    max_tokens: int = field(default=1024, metadata={"help": "Most tokens an input, a question's choices included."})
    max_body_bytes: int = field(default=1_000_000, metadata={"help": "Largest body of a request."})

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = [option.name for option in fields(self) if option.type is int and option.name not in _FROM_ZERO]
        problems = [f"{name} must be at least 1, got {value}" for name in counts if (value := getattr(self, name)) < 1]
        if self.max_samples < self.samples:
            problems.append(f"max_samples must be at least samples, {self.samples}, got {self.max_samples}")
        if not (math.isfinite(self.max_wait_ms) and self.max_wait_ms >= 0):
            problems.append(f"max_wait_ms must be a finite number of at least 0, got {self.max_wait_ms}")
        if self.queue < self.max_inputs:
            problems.append(f"queue must be at least max_inputs, {self.max_inputs}, got {self.queue}")
        if problems:
            raise RunError("\n".join(problems))


def read_keys(file: str | Path) -> tuple[str, ...]:
    """API keys, one a line; empty lines and those that start with # are left out.

    Raises:
        RunError: the file can't be read, holds no key, or one that an HTTP header can't carry.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"api_key_file {str(file)!r}: can't be read: {error}") from error
    keys = tuple(key for line in lines if (key := line.strip()) and not key.startswith("#"))
    if not keys:
        raise RunError(f"api_key_file {str(file)!r}: there is no key in it; write one a line")
    for number, key in enumerate(keys, start=1):
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise RunError(f"api_key_file {str(file)!r}: key {number} has characters other than visible ASCII")
    return keys


_FROM_ZERO = ("samples", "seed", "max_samples")
