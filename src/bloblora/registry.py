"""What is found by name: methods, priors, tasks and metrics; our own, and those of other installed packages."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from .messages import quoted

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """Things of one kind by name, each imported when it is first used.

    Another package adds one with an entry point in its ``pyproject.toml``, here a method called ``noisy``::

        [project.entry-points."bloblora.methods"]
        noisy = "my_package.noisy:Noisy"

    An entry that can't be imported or used is named in a warning and skipped.

    Args:
        group: the entry points' group, ``bloblora.methods``, ``bloblora.priors``, ``bloblora.tasks`` or
            ``bloblora.metrics``.
        own: ours by name; one that is imported when it is first used is said as ``module:attribute``.
        problem: what is wrong with a thing of another package, or None.
    """

    def __init__(
        self, group: str, own: Mapping[str, T | str], problem: Callable[[str, Any], str | None] = lambda *_: None
    ) -> None:
        self._group, self._own, self._problem = group, own, problem
        self._loaded: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        if name not in self._loaded:
            self._loaded[name] = self._load(name, self._own[name]) if name in self._own else self._others[name]
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from self._others

    def __len__(self) -> int:
        return len(self._own) + len(self._others)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._own or name in self._others)

    def find(self, name: str, field: str, error: type[ValueError] = ValueError) -> T:
        """The thing of a name.

        Raises:
            error: there is none; the message names the field and all that there are.
        """
        if not isinstance(name, str) or name not in self:
            raise error(f"{field} {quoted(name)} is not one of {', '.join(self)}")
        return self[name]

    def _load(self, name: str, own: T | str) -> T:
        return EntryPoint(name, own, self._group).load() if isinstance(own, str) else own

    @cached_property
    def _others(self) -> dict[str, T]:
        found: dict[str, T] = {}
        for entry in entry_points(group=self._group):
            try:
                loaded = entry.load()
                if entry.name in self._own or entry.name in found:
                    raise ValueError("there is one of this name already")
                if problem := self._problem(entry.name, loaded):
                    raise ValueError(problem)
            except Exception as error:  # whatever a package's import raises
                package = entry.dist.name if entry.dist else "?"
                warnings.warn(
                    f"{self._group}: {entry.name!r} of package {package} ({entry.value}) is skipped: "
                    f"{type(error).__name__}: {error}",
                    stacklevel=2,
                )
                continue
            found[entry.name] = loaded
        return found
