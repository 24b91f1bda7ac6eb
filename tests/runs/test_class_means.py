"""Runs whose head is made of class means."""

import json

import pytest
import torch

from bloblora import runs
from bloblora.cli import main
from bloblora.methods import METHODS
from bloblora.training.class_means import ClassMeans
from tests.tiny_base import QUESTIONS, queries, several, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")
OFFERED = [name for name, method in METHODS.items() if method.class_means]
OPTIONS = {"ensemble": {"members": 2}, "mixture": {"members": 2}, "distilled": {"distill_steps": 2}}


@pytest.fixture
def config(base, tmp_path):
    def build(method, records=None, **options):
        data = str(write_jsonl(tmp_path / "data.jsonl", records or queries() * 2))
        defaults = dict(steps=4, batch_size=4, r=2, learning_rate=0.02, head="class_means", validation=0.25)
        given = {"method": method, **defaults, **OPTIONS.get(method, {}), **options}
        return runs.RunConfig.of(data=data, output=str(tmp_path / "run"), **{"model": str(base), **given})

    return build


@pytest.mark.parametrize("method", OFFERED)
def test_every_method_that_offers_it_comes_back(method, config):
    run = runs.train(config(method), progress=False)
    inputs = [{"text": record["text"]} for record in queries()]
    before = run.predict(inputs, 3, seed=5)
    loaded = runs.load_run(run.config.output)
    assert torch.equal(loaded.predict(inputs, 3, seed=5).log_probs, before.log_probs)
    assert {"shrinkage", "scale", "nll"} == run.training["class_means"].keys()


@pytest.mark.parametrize(("method", "joins"), [("lora", True), ("blob", True), ("ensemble", False)])
def test_validation_records_join_the_means_in_the_end(method, joins, config, monkeypatch):
    """Where there is one training, after all that is measured on them."""
    found = []
    join = ClassMeans.join

    def spied(means):
        before = means.head.weight.clone()
        joined = join(means)
        found.append((joined, not torch.equal(before, means.head.weight)))
        return joined

    monkeypatch.setattr(ClassMeans, "join", spied)
    run = runs.train(config(method, several(12)), progress=False)  # enough of them for a temperature
    assert [(joined == run.training["class_means"], changed) for joined, changed in found] == [(True, True)] * joins
    assert (run.scales["temperature_of_mean"] == 1) == joins  # the scale of the means is chosen once more
    loaded = runs.load_run(run.config.output)
    assert loaded.scales == run.scales
    assert torch.equal(loaded.predict(["where is it"], 0).log_probs, run.predict(["where is it"], 0).log_probs)


def test_the_gaussian_is_then_over_a(config):
    run = runs.train(config("blob"), progress=False)
    assert run.training["automatic"]["factors"] == "A"
    assert runs.open_run(run.config.output).config.value("head_prior_std") == "none"


@pytest.mark.parametrize("method", ["lora", "blob", "distilled", "ensemble"])
def test_the_distance_from_the_training_records_is_kept(method, config):
    run = runs.train(config(method), progress=False)
    description = runs.open_run(run.config.output)
    first = runs.load_run(description)
    inputs = [{"text": text} for text in ("where is it", "an ode to the autumn wind", "money back")]
    scores = first.predict(inputs, 2).distances
    assert [*scores] == ["mahalanobis", "relative_mahalanobis"]
    fitted = runs.fit_distance(runs.load_run(description), description, runs.training_records(description))
    for name, expected in fitted.scores(first.hidden_states(inputs)).items():
        torch.testing.assert_close(scores[name], expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(run.predict(inputs, 2).distances[name], expected, rtol=1e-3, atol=1e-3)


def test_without_validation_the_discriminant_has_its_usual_shrinkage(config, base):
    found = runs.train(config("lora", validation=0), progress=False).training["class_means"]
    assert found == {"shrinkage": 0.9, "scale": pytest.approx(17 / 32)}


@pytest.mark.parametrize("method", sorted(METHODS.keys() - OFFERED))
def test_other_methods_say_so_before_the_model_is_loaded(method, config):
    with pytest.raises(runs.RunError, match="head 'class_means' is for task 'classification' and one of lora, "):
        runs.train(config(method, model="/nowhere"), progress=False)


def test_choices_have_no_such_head(config):
    with pytest.raises(runs.RunError, match="with task 'choice_text' and method 'lora' leave it out"):
        runs.train(config("lora", QUESTIONS * 2), progress=False)


def test_a_gaussian_head_and_class_means_are_two_heads(config):
    with pytest.raises(runs.RunError, match=r"head_prior_std 0\.1 are two kinds"):
        config("blob", head_prior_std=0.1)


def test_on_the_command_line(base, tmp_path, capsys):
    data = write_jsonl(tmp_path / "data.jsonl", queries() * 2)
    shape = ["--steps", "4", "--batch-size", "4", "--r", "2"]
    output = str(tmp_path / "run")
    main(["train", "--data", str(data), "--output", output, "--model", str(base), "--head", "class_means", *shape])
    assert "head" in capsys.readouterr().err
    main(["predict", output, "--input", str(data)])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == len(queries() * 2)
