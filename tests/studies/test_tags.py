"""Words with tags through a study: folds for a temperature, a trunk on disk, a report, a search."""

from functools import partial

import pytest
import torch

from bloblora import evaluation, runs, studies
from bloblora.data import read_records
from bloblora.runs import RunError
from tests.runs.test_token_classification import records
from tests.studies.conftest import write_study
from tests.tiny_base import write_jsonl


def test_a_study_of_tags(base, tmp_path):
    for seed, (name, count) in enumerate({"train": 24, "test": 12, "shifted": 4, "validation": 8}.items()):
        write_jsonl(tmp_path / f"{name}.jsonl", [*records(count, seed)])
    write_jsonl(tmp_path / "outside.jsonl", [{"tokens": ["gas", "air"]}, {"tokens": ["the"]}])
    sets = {"test": "test.jsonl", "shifted": {"other": "shifted.jsonl"}, "out_of_scope": "outside.jsonl"}
    content = {
        "models": [str(base)],
        "seeds": [0],
        "samples": [0, 2],
        "train": {"steps": 2, "batch_size": 8, "r": 2, "top_blocks": 1},
        "datasets": {"ner": {"train": {"data": "train.jsonl"}, **sets, "validation": "validation.jsonl"}},
        "methods": {"lora": {"trunk_cache": str(tmp_path / "trunk")}, "blob": {"temperature_folds": 2}},
        "distances": True,
    }
    study = studies.read_study(write_study(tmp_path, content))
    there = {"runs": tmp_path / "runs", "data": tmp_path, "engine": "debug"}
    outcomes = studies.compare(study, tmp_path / "results", **there)
    assert [outcome.error for outcome in outcomes] == [None] * 2
    jobs = {job.label: job for job in study.jobs(tmp_path / "runs", tmp_path)}
    result = studies.read_result(tmp_path / "results", jobs["blob"].name)
    run, test = runs.load_run(jobs["blob"].config.output), read_records(str(tmp_path / "test.jsonl"))
    expected = evaluation.summary(run.predict(test, 2, seed=0), runs.targets_of(run.task, test))
    assert {"nll", "token_accuracy", "entity_f1", "token_ece"} <= {*expected}
    assert result.metrics["test"]["2"] == pytest.approx(expected, rel=1e-5)
    assert result.training["rescaling"]["folds"] == 2
    assert {"auroc_mutual_information", "auroc_mahalanobis"} <= {*result.metrics["out_of_scope"]["2"]}

    cached, config = runs.load_run(jobs["lora"].config.output), jobs["lora"].config
    whole = runs.train(config.with_options(trunk_cache=None, output=str(tmp_path / "whole")), progress=False)
    assert [*(tmp_path / "trunk").glob("*.npy")]
    assert "trunk_cache" not in studies.read_result(tmp_path / "results", jobs["lora"].name).config
    torch.testing.assert_close(cached.predict(test, 0).logits, whole.predict(test, 0).logits, rtol=1e-4, atol=1e-5)

    text = (studies.report(tmp_path / "results").parent / "report.md").read_text()
    assert "| token accuracy ↑ |" in text
    assert "shift to other" in text
    assert "ECE floor" not in text

    search = partial(studies.tune, study, "ner", tmp_path / "search", method="lora", trials=1, data=tmp_path)
    (trial,) = search()
    assert trial.feasible
    assert 0 <= trial.metrics["entity_f1"] <= 1
    with pytest.raises(RunError, match="those of task 'token_classification' aren't: take 'nll'"):
        search(aim="ece")
