"""Which records of a source a run trains on, which it holds out, and which it leaves."""

import math
import random
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from .. import methods, tasks
from ..data import MappedRows
from ..data.records import first_copies, grouped
from .checks import task_name
from .config import RunConfig

Records = TypeVar("Records", list[dict[str, Any]], MappedRows)


def select(records: Records, limit: int | None, seed: int = 0, by: str | None = "label") -> Records:
    """``limit`` random records, per label where records have one; all of them for None."""
    return records if limit is None else _at(records, _chosen(records, limit, seed, by))


def select_for(config: RunConfig, records: Records) -> Records:
    """Those that a configuration selects of the records of its data."""
    if config.limit is None:
        return records
    return select(records, config.limit, config.limit_seed, groups_by(config, records))


def unused(config: RunConfig, records: Records) -> Records:
    """Those that `select_for` leaves out of the records of a configuration's data, in the given order."""
    limit = len(records) if config.limit is None else config.limit
    chosen = _chosen(records, limit, config.limit_seed, groups_by(config, records))
    return _at(records, sorted({*range(len(records))}.difference(chosen)))


def split(records: Records, share: float, seed: int = 0, by: str | None = "label") -> tuple[Records, Records]:
    """Records to train on and a share that is held out, per label where records have one; each in the given order.

    Copies of a record are all on one side, unless nothing could be held out so.
    """
    generator = random.Random(seed)
    groups = _groups(records, by)
    counts = _held_out([len(group) for group in groups], share, seed)
    if not any(counts):  # copies, for which all records are read, needn't be known
        return _at(records, [*range(len(records))]), _at(records, [])
    same = first_copies(records)
    out = {i for group, count in zip(groups, counts, strict=True) for i in _sample_whole(group, same, count, generator)}
    if not out:
        out = {i for group, count in zip(groups, counts, strict=True) for i in generator.sample(group, count)}
    return _at(records, [i for i in range(len(records)) if i not in out]), _at(records, sorted(out))


def hold_out(config: RunConfig, method: methods.Method, records: Records) -> tuple[Records, Records]:
    """Records to train on, and those held out: for validation, or, where there is none, what the method asks for."""
    if isinstance(config.validation, str | list):
        return split(records, 0)
    return split(records, config.validation or method.holdout, config.seed, groups_by(config, records))


def label_counts(config: RunConfig, records: Sequence[dict[str, Any]]) -> list[int]:
    """How many records each label has, by its name; the number of all where records have none."""
    return [len(group) for group in _groups(records, groups_by(config, records))]


def groups_by(config: RunConfig, records: Sequence[dict[str, Any]]) -> str | None:
    """The field whose values are names that records share; None where the task has none."""
    return "label" if tasks.TASKS[task_name(config, records)].answer == "label" else None


def num_held_out(counts: Sequence[int], share: float) -> int:
    """How many records `split` holds out where each label has so many."""
    return sum(_held_out(counts, share))


def _held_out(counts: Sequence[int], share: float, seed: int = 0) -> list[int]:
    """How many of each label are held out: the share, rounded, of all but one at most.

    Where the rounded ones don't make the share of all records, as of many labels with few records each, by the largest
    remainders; labels with the same one take turns by the seed.
    """
    out, total = [min(round(share * count), count - 1) for count in counts], round(share * sum(counts))
    if sum(out) == total:
        return out
    out = [min(math.floor(share * count), count - 1) for count in counts]
    generator = random.Random(seed)
    more = [i for i, count in enumerate(counts) if out[i] < count - 1]
    more.sort(key=lambda i: (out[i] - share * counts[i], generator.random()))
    for i in more[: total - sum(out)]:
        out[i] += 1
    return out


def _sample_whole(positions: Sequence[int], same: Sequence[int], count: int, generator: random.Random) -> list[int]:
    """``count`` random positions, or fewer, where those of copies can't be divided."""
    units = grouped(positions, same)
    if len(units) == len(positions):
        return generator.sample(positions, count)
    chosen: list[int] = []
    for unit in generator.sample(units, len(units)):
        if len(chosen) + len(unit) <= count:
            chosen += unit
    return chosen


def _chosen(records: Records, limit: int, seed: int, by: str | None) -> list[int]:
    generator = random.Random(seed)
    return [i for group in _groups(records, by) for i in generator.sample(group, min(limit, len(group)))]


def _groups(records: Iterable[dict[str, Any]], by: str | None) -> list[list[int]]:
    """Positions of the records of each value of a field, in their order; all where records have none."""
    groups: dict[str, list[int]] = {}
    for position, record in enumerate(records):
        groups.setdefault(record.get(by, "") if by else "", []).append(position)
    return [group for _, group in sorted(groups.items())]


def _at(records: Records, positions: list[int]) -> Records:
    if isinstance(records, MappedRows):
        return records.select(positions)
    return [records[position] for position in positions]
