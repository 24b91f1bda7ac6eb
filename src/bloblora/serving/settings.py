"""What a server allows, and the keys that open it."""

import math
from dataclasses import dataclass, fields
from pathlib import Path

from ..runs import RunError, check_samples


@dataclass(frozen=True)
class Settings:
    """Limits and defaults.

    Args:
        samples: weight draws N of a request that names none; 0 is the posterior mean.
        seed: of the draws.
        max_samples: largest N that a request may name.
        max_batch: inputs a forward.
        max_wait_ms: how long the first input of a batch waits for others, milliseconds.
        queue: most inputs that wait; a request that would make it more is told to come again.
        max_inputs: most inputs a request.
        max_tokens: most tokens an input, a question's choices included.
        max_body_bytes: largest body of a request.
        approximate: how predictions save forwards, as `bloblora.runs.load_run` takes it; None for all draws.

    Raises:
        RunError: one is out of its range; the message lists all.
    """

    samples: int = 10
    seed: int = 0
    max_samples: int = 100
    max_batch: int = 16
    max_wait_ms: float = 5.0
    queue: int = 256
    max_inputs: int = 64
    max_tokens: int = 1024
    max_body_bytes: int = 1_000_000
    approximate: str | None = None

    def __post_init__(self) -> None:
        check_samples(self.samples, self.seed)
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
