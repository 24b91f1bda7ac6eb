"""Runs of a head that isn't a choice of one label, on a module's own `records`."""

import pytest

from bloblora import runs
from tests.tiny_base import write_jsonl


def train(base, folder, data, **options):
    """A run of a few steps in a folder, on records or a file of them."""
    shape = {"steps": 4, "batch_size": 8, "r": 2, "validation": 0, "model": str(base), "output": str(folder / "run")}
    return runs.train(runs.RunConfig.of(**shape | {"data": data} | options), progress=False)


@pytest.fixture(scope="module")
def trained(request, base, tmp_path_factory):
    """A run that has learned 150 of the module's records, with the module's `TRAINING`."""
    folder = tmp_path_factory.mktemp("trained")
    shape = {"steps": 120, "batch_size": 16, "r": 4, "learning_rate": 0.01, "validation": "auto"}
    data = str(write_jsonl(folder / "train.jsonl", [*request.module.records(150)]))
    return train(base, folder, data, **shape | getattr(request.module, "TRAINING", {}))
