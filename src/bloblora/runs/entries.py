"""Files of a run's folder that hold something for each way to predict: decisions, and maps of correctness."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..files import locked, read_hashed_json, write_hashed_json
from .config import RunError


@dataclass(frozen=True)
class EntriesFile:
    """Such a file, hashed and locked.

    Attributes:
        kind: the dataclass of what it holds: ``format_version``, and the list of entries.
        version: of the format.
        command: that writes it.
    """

    kind: type[Any]
    version: int
    command: str

    def read(self, file: Path) -> list[dict[str, Any]]:
        """The entries; none where there is no file.

        Raises:
            RunError: it is damaged, or of another version.
        """
        if not file.is_file():
            return []
        stored = read_hashed_json(file, RunError, self.kind)
        if (found := stored["format_version"]) != self.version:
            raise RunError(
                f"{file}: format_version is {found}; this bloblora reads {self.version}: remove the file, and run "
                f"`bloblora {self.command}` again"
            )
        return stored[self._list]

    def write(self, file: Path, entries: Sequence[Mapping[str, Any]]) -> None:
        """Write these entries alone."""
        write_hashed_json(file, {"format_version": self.version, self._list: [*entries]})

    def put(self, file: Path, entry: Mapping[str, Any], how: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Put an entry in the place of the one of the same ``how``; those of another ``state`` of the run go."""
        with locked(file):
            self.write(file, [*(one for one in self.read(file) if has(one, state) and not has(one, how)), entry])

    @property
    def _list(self) -> str:
        return fields(self.kind)[1].name


def has(entry: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether an entry has these values."""
    return all(entry.get(name) == value for name, value in values.items())


def changes(entry: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each value that is another one in an entry than now, and both, for a message."""
    return [f"{name} {entry.get(name)} there, {value} now" for name, value in now.items() if entry.get(name) != value]


def there_and_now(entries: Iterable[Mapping[str, Any]], now: Mapping[str, Any]) -> str:
    """What entries are for, and what is asked for now, for a message."""
    there, here = ([", ".join(f"{name} {one.get(name)}" for name in now) for one in side] for side in (entries, [now]))
    return f"{'; '.join(there)} there, {here[0]} now"
