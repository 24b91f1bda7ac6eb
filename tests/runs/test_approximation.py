"""Approximations by name: what they do to a run, and where they are refused."""

import json

import pytest
import torch

from bloblora import runs
from bloblora.cli import main
from bloblora.data import support_desk
from bloblora.prediction import Linearized, StoppingRule, TopBlocks, WeightDraws, predict
from bloblora.runs.decide import calibrate, open_decision
from bloblora.runs.evaluate import lines_of
from tests.conftest import OVER_A
from tests.tiny_base import queries, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"steps": 2, "batch_size": 2, "r": 2, "init_std": 0.25}


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("approximation")
    texts = str(write_jsonl(folder / "texts.jsonl", queries() * 4))
    for name, options in {
        "blob": OVER_A,
        "scaled": {"temperature_scaling": True, "validation": 0.5, **OVER_A},
        "lora": {"method": "lora"},
    }.items():
        options = {key: value for key, value in OPTIONS.items() if key != "init_std" or name != "lora"} | options
        runs.train(runs.RunConfig.of(data=texts, output=str(folder / name), model=str(base), **options))
    return folder


def probabilities(run, num_samples=10, sampler=None, stop=None):
    examples = [run.task.encode({"text": record["text"]}, run.tokenizer) for record in queries()]
    sampler = sampler or run.sampler
    return predict(run.model, examples, num_samples, task=run.task, sampler=sampler, stop=stop).probabilities


@pytest.mark.parametrize(
    ("name", "sampler", "stop"),
    [
        ("mirrored", lambda q: WeightDraws(q, mirrored=True), None),
        ("linearized", Linearized, None),
        ("top-blocks:1", lambda q: WeightDraws(TopBlocks(q, 1)), None),
        ("stop", WeightDraws, StoppingRule()),
        ("stop:0.3:0.2", WeightDraws, StoppingRule(0.3, 0.2)),
        ("mirrored-stop:0.3:0.2", lambda q: WeightDraws(q, mirrored=True), StoppingRule(0.3, 0.2, (2, 4, 6))),
    ],
)
def test_a_run_predicts_as_its_approximation_does(folder, name, sampler, stop):
    run = runs.load_run(folder / "blob", name)
    whole = runs.load_run(folder / "blob")
    expected = probabilities(whole, sampler=sampler(whole.sampler.weights), stop=stop)
    found = run.predict(queries()).probabilities
    assert torch.equal(found, expected)
    assert run.approximation.name == name
    if name != "stop":
        assert not torch.equal(found, whole.predict(queries()).probabilities)


def test_a_temperature_stays(folder):
    run, whole = (runs.load_run(folder / "scaled", name) for name in ("mirrored", None))
    assert run.sampler.temperature == whole.sampler.temperature
    assert run.sampler.sampler.mirrored


def test_the_spread_is_over_the_draws_that_were_made(folder):
    prediction = runs.load_run(folder / "blob", "stop:0.5:1").predict(queries())
    made = int(prediction.num_draws.min())
    assert made < 10
    row = int(prediction.num_draws.argmin())
    expected = prediction.draw_probabilities[:made, row].std(0, correction=0)
    torch.testing.assert_close(prediction.std[row], expected)


@pytest.mark.parametrize("name", ["", "mirror", "mirrored:2", "top-blocks", "top-blocks:0", "top-blocks:x", "stop:1"])
def test_a_name_that_is_none(folder, name):
    with pytest.raises(runs.RunError, match="approximate: "):
        runs.load_run(folder / "blob", name)


def test_a_value_out_of_range(folder):
    with pytest.raises(runs.RunError, match=r"approximate: 'stop:2:0.1': error must be in \(0, 1\), got 2"):
        runs.load_run(folder / "blob", "stop:2:0.1")


def test_a_method_without_a_gaussian(folder, capsys):
    with pytest.raises(runs.RunError, match="approximate 'mirrored' needs a Gaussian over LoRA; method 'lora'"):
        runs.load_run(folder / "lora", "mirrored")
    with pytest.raises(SystemExit):
        main(["predict", f"{folder}/lora", "--input", f"{folder}/texts.jsonl", "--approximate", "linearized"])
    assert "method 'lora' has none" in capsys.readouterr().err


def test_the_commands_take_it(folder):
    texts, output = f"{folder}/texts.jsonl", folder / "answers.jsonl"
    main(["predict", f"{folder}/blob", "--input", texts, "--output", str(output), "--approximate", "linearized"])
    run = runs.load_run(folder / "blob", "linearized")
    expected = [*lines_of(run.task, queries() * 4, run.predict(queries() * 4), None)]
    assert [json.loads(line) for line in output.read_text().splitlines()] == expected
    written = folder / "evaluated.jsonl"
    evaluate = ["evaluate", f"{folder}/blob", "--data", texts, "--predictions", str(written)]
    main([*evaluate, "--approximate", "linearized"])
    assert json.loads((folder / "evaluated.jsonl.meta.json").read_text())["approximate"] == "linearized"
    with pytest.raises(SystemExit):
        main(evaluate)  # these lines are another prediction's


def test_decisions_are_for_their_approximation(folder):
    held_out = [
        {"text": record["text"], "label": ("parcel", "refund")[i % 2]}
        for i, record in enumerate(support_desk("test")[:60])
    ]
    options = {"risk": 0.9, "level": 0.5, "coverage": 0.6, "false_alarm": 0.3}
    description = runs.open_run(folder / "blob")
    two = runs.PredictionOptions(samples=2, approximate="mirrored")
    calibrate(description, held_out, options=two, **options)
    assert open_decision(description, two) is not None
    with pytest.raises(runs.RunError, match=r"approximate mirrored there, .* approximate None now"):
        open_decision(description, runs.PredictionOptions(samples=2))
