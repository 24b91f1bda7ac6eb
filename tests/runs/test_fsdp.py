"""Two processes over which FSDP2 has split the model, as the shipped configuration starts them, against one."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import bloblora
from bloblora import predict, runs
from bloblora.cli import main
from bloblora.methods import METHODS
from bloblora.prediction import WeightDraws
from bloblora.runs.checks import check_sharded
from tests.tiny_base import queries, save_base, write_jsonl
from tests.training.conftest import TASK, _base, _base_state, assert_close, assert_equal, examples

from .fsdp_process import LOGGED, SAVED, TRAININGS, predict_of, quiet, run, validated
from .launched import Quiet, launch

WEIGHTS = ("adapter_model.safetensors", "posterior.safetensors")
CONFIG = "examples/accelerate/fsdp.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_thread):
    folder = tmp_path_factory.mktemp("fsdp")
    save_base(folder / "base")
    write_jsonl(folder / "texts.jsonl", queries() * 4)
    write_jsonl(folder / "validation.jsonl", [{**r, "text": r["text"] + " again"} for r in queries()[::-1] * 2])
    launch(CONFIG, "tests.runs.fsdp_process", str(folder))
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("which", TRAININGS)
def test_the_posterior_is_that_of_one_process(tmp_path, ranks, which):
    expected = quiet(tmp_path, *which, batch=8)
    for rank in ranks:
        assert_close(rank[which]["weights"], expected["weights"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(rank[which]["frozen"], expected["frozen"], rtol=0, atol=0)
    assert len(expected["frozen"]) == (4 if "frozen" in which else 0)
    for key in LOGGED:  # the first process's: where the KL is an estimate, each logs its own
        assert ranks[0][which]["logs"][key] == pytest.approx(expected["logs"][key], rel=1e-4), key


def test_draws_of_a_sharded_model_are_those_of_the_saved_one(folder, ranks):
    base = _base()
    base.load_state_dict(_base_state())
    model = bloblora.load(base, folder / "paper_flow-normal" / SAVED)
    sampler = WeightDraws(bloblora.find_posterior(model))
    for samples in (0, 5):
        expected = predict(model, examples(8), samples, 3, task=TASK, sampler=sampler).log_probs
        for rank in ranks:
            torch.testing.assert_close(rank["paper_flow", "normal"]["log_probs"][samples], expected)


def test_each_process_has_its_own_noise(ranks):
    a, b = (rank["noisy"] for rank in ranks)
    assert_equal(a["weights"], b["weights"])
    first, second = a["seen"][0], b["seen"][0]
    mean = torch.cat([first, second]).mean(0)
    x, y = (first - mean).mean(1).flatten(), (second - mean).mean(1).flatten()
    assert x.std() > 0.1 * mean.abs().mean()
    assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1]) < 4 / math.sqrt(len(x))


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_training_resumes_from_either_kind_of_checkpoint(folder, ranks, kind):
    saved = folder / kind / "checkpoint-4"
    assert (saved / "pytorch_model_fsdp_0").is_dir() == (kind == "SHARDED_STATE_DICT")
    assert bloblora.adapter.check_folder(saved) == saved
    for rank in ranks:
        assert_equal(rank[kind]["resumed"], rank[kind]["weights"])


def test_all_processes_say_what_is_wrong(ranks):
    for diverged, saved, watched in (rank["errors"] for rank in ranks):
        assert "the loss is not finite at step 1" in diverged  # in one of them
        assert "call BlobTrainer.save_model" in saved
        assert "histograms are of a whole one" in watched


@pytest.mark.parametrize(
    ("named", "options"),
    [
        ("method 'laplace-lora'", {"method": "laplace-lora"}),
        ("temperature_folds 3", {"temperature_folds": 3}),
        ("trunk_cache 'cache'", {"trunk_cache": "cache", "top_blocks": 1}),
    ],
)
def test_what_is_not_offered_is_refused_first(tmp_path, monkeypatch, named, options):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(runs.RunError, match=f"{named} isn't offered under FSDP"):
        runs.train(runs.RunConfig.of(data="no.jsonl", output=str(tmp_path / "run"), **options))


def test_an_approximation_that_is_not_offered():
    check_sharded(METHODS["blob"](), "mirrored")
    with pytest.raises(runs.RunError, match="approximate 'linearized' isn't offered under FSDP"):
        check_sharded(METHODS["blob"](), "linearized")


def test_a_file_is_predicted_by_a_split_model(folder, ranks):
    held, all_of_it = zip(*(rank["parts"] for rank in ranks), strict=True)
    assert sum(held) == pytest.approx(all_of_it[0], rel=0.01)
    main([*predict_of(folder), f"{folder}/one.jsonl"])
    one, two = ((folder / name).read_text().splitlines() for name in ("one.jsonl", "answers.jsonl"))
    assert len(two) == len(one) == 16
    for found, expected in zip(map(json.loads, two), map(json.loads, one), strict=True):
        assert found["label"] == expected["label"]
        assert found["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-6)
        assert found["mutual_information"] == pytest.approx(expected["mutual_information"], abs=1e-6)
    assert not [*folder.glob(".*.jsonl*")]


def test_a_run_is_that_of_one_process(folder):
    run(folder, "quiet-one", Quiet())
    one, two = (folder / f"quiet-{suffix}" for suffix in ("one", "two"))
    assert {file.name for file in two.iterdir()} == {file.name for file in one.iterdir()}
    for name in WEIGHTS:
        assert_close(load_file(two / name), load_file(one / name), rtol=1e-4, atol=1e-5)


def test_validation_and_the_scales_are_those_of_one_process(folder):
    validated(folder, "validated-one")
    one, two = (
        json.loads((folder / f"validated-{suffix}" / "run.json").read_text())["training"] for suffix in ("one", "two")
    )
    (one_curve,), (two_curve,) = (training["validation"]["trainings"] for training in (one, two))
    assert two_curve["best_step"] == one_curve["best_step"]
    for a, b in zip(one_curve["curve"], two_curve["curve"], strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    assert two["rescaling"] == pytest.approx(one["rescaling"], rel=1e-3)
    assert two["held_out"]["by_num_samples"]["10"] == pytest.approx(one["held_out"]["by_num_samples"]["10"], rel=1e-3)
    for name in WEIGHTS:
        found, expected = (load_file(folder / f"validated-{suffix}" / name) for suffix in ("two", "one"))
        assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_stopped_run_goes_on(folder, ranks):
    assert [rank["resumed_from"] for rank in ranks] == ["checkpoint-3"] * 2
    for name in WEIGHTS:
        assert_equal(load_file(folder / "stopped" / name), load_file(folder / "whole" / name))
    assert runs.load_run(folder / "stopped").predict(queries(), 3).log_probs.isfinite().all()
