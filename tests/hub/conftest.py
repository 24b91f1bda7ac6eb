"""A finished run with all that a user's folder may hold."""

from types import SimpleNamespace

import pytest

from bloblora import runs
from bloblora.runs.decide import calibrate
from bloblora.runs.evaluate import save_metrics
from tests.tiny_base import held_out, queries, write_jsonl

THREE = runs.PredictionOptions(samples=3)


@pytest.fixture(scope="session")
def trained(base, tmp_path_factory):
    """Folder of a run that was evaluated and calibrated, and its data."""
    folder = tmp_path_factory.mktemp("hub")
    data = write_jsonl(folder / "private queries.jsonl", queries())
    config = runs.RunConfig.of(
        data=str(data),
        output=str(folder / "desk"),
        model=str(base),
        steps=2,
        batch_size=2,
        r=2,
        learning_rate=0.01,
        factors="none",
        keep_checkpoints=True,
    )
    run = runs.train(config, progress=False)
    output = folder / "desk"
    test = runs.evaluate(run, queries(), options=THREE, diagram=output / "reliability-test.png")
    save_metrics(runs.open_run(output), test, THREE, str(data))
    mean = {"accuracy": 0.25, "nll": float("inf"), "num_samples": 0}
    save_metrics(runs.open_run(output), mean, runs.PredictionOptions(samples=0), "support_desk:test")
    promises = {"risk": 0.9, "level": 0.5, "coverage": 0.5, "false_alarm": 0.5}
    calibrate(runs.open_run(output), held_out(), options=THREE, **promises)
    write_jsonl(output / "queries.jsonl", queries())  # nobody else's business
    return SimpleNamespace(folder=output, data=data, test=test)
