"""τ and T against known answers, and cross-validation: no record is predicted by a model that was trained on it."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import bloblora
from bloblora import posterior as q
from bloblora import runs
from bloblora.adapter import BlobConfig, bayesianize
from bloblora.hub import model_card
from bloblora.methods import Method, Rescaled, Training, rescaled
from bloblora.methods.ensemble import Ensemble
from bloblora.methods.rescaled import _HeldOut, fit_scales, folds
from bloblora.methods.scalabl import ScaledRows
from bloblora.methods.swag import LowRank
from bloblora.models import load_model
from bloblora.prediction import Point, StoppingRule, Tempered, WeightDraws, fit_temperature, predict
from bloblora.serving import Settings, load_hosted, open_hosted
from tests.conftest import tiny_llama, with_lora
from tests.methods.interrupt import Interrupt, Stop
from tests.methods.test_known_answers import Net
from tests.serving.conftest import serving
from tests.tiny_base import queries, several, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")
FEATURES, RIGHT_STD, NUM_SAMPLES = 6, 0.5, 40


class Rows:
    """A task of a linear layer with 3 classes; it notes which rows it is asked to put together."""

    kind = "classification"

    def __init__(self):
        self.asked = []

    def length(self, example):
        return 1

    def collate(self, examples):
        self.asked += [example["number"] for example in examples if "number" in example]
        return {"x": torch.stack([e["x"] for e in examples]), "labels": torch.tensor([e["label"] for e in examples])}

    def logits(self, model, batch):
        return model(batch["x"])


@pytest.fixture(scope="module")
def gaussian():
    """A function that gives a linear model whose A is N(M, (factor Ω)²), and records of the case with factor 1."""

    def build(factor):
        torch.manual_seed(0)
        model = get_peft_model(Net(), LoraConfig(r=2, lora_alpha=2, target_modules=["linear"]))
        nn.init.normal_(model.base_model.model.linear.lora_B["default"].weight)
        nn.init.normal_(model.base_model.model.linear.lora_A["default"].weight)
        posterior = bayesianize(model, BlobConfig(std_parameterization="log"))
        for parameter in posterior.spread():
            nn.init.constant_(parameter, math.log(factor * RIGHT_STD))
        return model, posterior

    model, posterior = build(1.0)
    generator, examples = torch.Generator().manual_seed(1), []
    with torch.no_grad():
        for x in torch.randn(1000, FEATURES, generator=generator):
            with posterior.draw(generator):  # each record has a draw of its own, so that the average is the truth
                p = model(x[None]).softmax(-1)
            examples.append({"x": x, "label": int(p.multinomial(1, generator=generator))})
    return build, examples


def test_a_posterior_three_times_too_wide(gaussian, monkeypatch):
    """The truth's own average has the lowest NLL of all, so that τ = 1/3 and T = 1 in the limit of many draws.

    With 1,000 records 1/2 can't be told from it.
    """
    monkeypatch.setattr(rescaled, "_NUM_SAMPLES", NUM_SAMPLES)
    build, examples = gaussian
    model, posterior = build(3.0)
    before = [parameter.clone() for parameter in posterior.spread()]
    scales, report = fit_scales([_HeldOut(model, WeightDraws(posterior), examples, Rows())])
    assert 0.25 <= scales.width <= 0.5
    assert -0.4 < math.log(scales.temperature) < 0.2  # lower under a width of 1/2
    assert report["gain"] > report["gain_standard_error"] > 0
    assert report["nll"] < report["nll_of_temperature_alone"] < report["nll_before"]
    assert all(torch.equal(a, b) for a, b in zip(before, posterior.spread(), strict=True))


@pytest.mark.parametrize("scalable", [True, False])
def test_the_mean_alone_has_a_temperature_of_its_own(scalable, gaussian, monkeypatch):
    """It is surer than the average of the draws: its T is larger, and divides its logits alone."""
    monkeypatch.setattr(rescaled, "_NUM_SAMPLES", NUM_SAMPLES)
    build, examples = gaussian[0], gaussian[1][:300]
    model, posterior = build(1.0)
    if not scalable:
        monkeypatch.setattr(WeightDraws, "scalable", None)
    draws = WeightDraws(posterior)
    scales, report = fit_scales([_HeldOut(model, draws, examples, Rows())])
    x = torch.stack([example["x"] for example in examples])
    (logits,) = draws.logits(lambda: model(x), 0, 0)
    expected = fit_temperature([logits[None].detach()], [torch.tensor([example["label"] for example in examples])])
    assert report["temperature_of_mean"] == pytest.approx(expected, rel=1e-4)
    assert scales.width == (1 if scalable else None)
    assert expected > 1.1 * scales.temperature
    tempered = Tempered(draws, scales.temperature, expected)
    torch.testing.assert_close(next(tempered.logits(lambda: model(x), 0, 0)), logits / expected)
    (draw,) = draws.logits(lambda: model(x), 1, 0)
    torch.testing.assert_close(next(tempered.logits(lambda: model(x), 1, 0)), draw / scales.temperature)


def test_without_width_every_prediction_is_one_forward_of_the_mean(gaussian):
    model, posterior = gaussian[0](1.0)
    draws, x, forwards = WeightDraws(posterior), torch.randn(5, FEATURES), []

    def forward():
        forwards.append(1)
        return model(x)

    for stop in (None, StoppingRule()):
        found = [
            predict(model, [{"x": row, "label": 0} for row in x], num_samples, task=Rows(), sampler=sampler, stop=stop)
            for num_samples, sampler in ((10, Tempered(draws, 3.0, 2.0, 0.0)), (0, Tempered(draws, 1.0, 2.0, 1.0)))
        ]
        assert torch.equal(found[0].log_probs, found[1].log_probs)
        assert (found[0].mutual_information == 0).all()
    assert len([*Tempered(draws, 3.0, 2.0, 0.0).logits(forward, 10, 0)]) == len(forwards) == 1


def test_a_right_posterior_stays(gaussian, monkeypatch):
    monkeypatch.setattr(rescaled, "_NUM_SAMPLES", NUM_SAMPLES)
    build, examples = gaussian
    model, posterior = build(1.0)
    scales, report = fit_scales([_HeldOut(model, WeightDraws(posterior), examples[:300], Rows())])
    assert scales.width == 1
    assert 0 <= report["gain"] <= report["gain_standard_error"]


@pytest.mark.parametrize("parameterization", q.STD_PARAMETERIZATIONS)
@pytest.mark.parametrize("factor", [1e-6, 0.3, 5.0])
def test_the_scale_of_a_parameter(factor, parameterization):
    parameter = torch.tensor([-30.0, -3.0, -0.2, 0.4, 4.0], dtype=torch.float64)
    found = q.std(q.std_parameter(factor * q.std(parameter, parameterization), parameterization), parameterization)
    torch.testing.assert_close(found, factor * q.std(parameter, parameterization), rtol=1e-6, atol=0)


def deviations(kind):
    """What `scale_` is called on, and a function: how far the next draw is from the mean."""
    seed = torch.Generator().manual_seed
    if kind in ("swag", "posterior"):
        posterior = bayesianize(with_lora(tiny_llama()), BlobConfig(factors="AB"))
        means = posterior.named_means()
        columns = {name: torch.randn(2, *mean.shape) for name, mean in means.items()}
        weights = LowRank(posterior, columns) if kind == "swag" else posterior
        name, mean = next(iter(means.items()))
        return weights, lambda: weights.sample(seed(0))[name.rpartition(".")[0]]["A"] - mean
    rows = ScaledRows(with_lora(tiny_llama()), {"layer": torch.rand(4)})
    return rows, lambda: rows.scale("layer", torch.zeros(4, 3), seed(0)) - 1


@pytest.mark.parametrize("kind", ["posterior", "swag", "scalabl"])
@torch.no_grad()
def test_a_scaled_draw_is_so_much_farther_from_the_mean(kind):
    weights, deviation = deviations(kind)
    before = deviation()
    with rescaled._scaled(weights, 2.5):
        torch.testing.assert_close(deviation(), 2.5 * before, rtol=1e-4, atol=1e-5)
    assert torch.equal(deviation(), before)


def test_folds_have_equal_shares_of_each_label():
    labels = [0] * 10 + [1] * 7 + [2] * 3
    examples = [{"input_ids": [number], "label": label} for number, label in enumerate(labels)]
    found = folds(examples, 3, seed=1)
    assert sorted(position for fold in found for position in fold) == [*range(20)]
    for label in range(3):
        counts = [sum(labels[position] == label for position in fold) for fold in found]
        assert max(counts) - min(counts) <= 1
    assert {len(fold) for fold in found} == {6, 7}
    assert found == folds(examples, 3, seed=1) != folds(examples, 3, seed=2)


def test_copies_are_in_one_fold():
    examples = [{"input_ids": [number // 4], "label": number // 20} for number in range(60)]
    found = folds(examples, 3)
    texts = [{examples[position]["input_ids"][0] for position in fold} for fold in found]
    assert [len(fold) for fold in found] == [20, 20, 20]
    assert sum(map(len, texts)) == 15


@dataclass(kw_only=True)
class Noting(Method):
    """Notes what it is trained on, and on which model."""

    trained_on: list = field(default_factory=list)
    name = "noting"

    def fit(self, model, training):
        weight = next(parameter for parameter in model.parameters() if parameter.requires_grad)
        assert not weight.any()  # no training before has touched this model
        weight.data += 1
        numbers = {example["number"] for example in training.examples}
        self.trained_on.append((numbers, Path(training.arguments["output_dir"]).name, len(training.task.asked)))
        return Point()


def test_no_record_is_predicted_by_a_model_that_was_trained_on_it(tmp_path):
    task, inner = Rows(), Noting()
    examples = [{"x": torch.randn(FEATURES), "label": i % 3, "number": i} for i in range(17)]
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["linear"]))
    nn.init.zeros_(model.base_model.model.linear.lora_A["default"].weight)
    training = Training(task, examples, {"output_dir": str(tmp_path)})
    Rescaled(inner=inner, folds=4).fit(model, training)
    *parts, (last, place, _) = inner.trained_on
    assert len(last) == 17
    assert place == tmp_path.name
    assert [name for _, name, _ in parts] == [f"fold_{k}_of_4" for k in (1, 2, 3, 4)]
    ends = [*(start for _, _, start in parts[1:]), len(task.asked)]
    for (numbers, _, start), end in zip(parts, ends, strict=True):
        assert numbers.isdisjoint(task.asked[start:end])
        assert numbers.union(task.asked[start:end]) == {*range(17)}
    assert sorted(task.asked) == [*range(17)]
    assert training.found["rescaling"]["num_records"] == 17


def test_a_copy_has_the_adapters_whose_turn_is_yet_to_come():
    """PEFT freezes all but one; what is trained later must not be shared either."""
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = Ensemble(members=2).prepare(tiny_llama(), lora)
    copied = dict(rescaled._copy(model).named_parameters())
    for name, parameter in model.named_parameters():
        assert (copied[name] is parameter) == ("member_" not in name), name
        assert torch.equal(copied[name], parameter)


def test_a_copy_shares_what_is_frozen():
    model = with_lora(tiny_llama())
    copied = rescaled._copy(model)
    assert isinstance(copied, PeftModel)
    for (name, parameter), other in zip(model.named_parameters(), copied.parameters(), strict=True):
        assert (parameter is other) == (not parameter.requires_grad), name
        assert torch.equal(parameter, other)


@pytest.fixture
def config(base, tmp_path):
    def build(records=None, **options):
        settings = {"method": "blob", "steps": 4, "batch_size": 2, "r": 2, "learning_rate": 0.05}
        data = str(write_jsonl(tmp_path / "data.jsonl", records or queries() * 2))
        return runs.RunConfig.of(data=data, output=str(tmp_path / "run"), model=str(base), **{**settings, **options})

    return build


few = pytest.mark.filterwarnings("ignore:temperature_.* records are too few:UserWarning")


@few
@pytest.mark.filterwarnings("ignore:min_std:UserWarning")
def test_a_scaled_posterior_comes_back(config):
    """Saved with the run, in which the posterior's own draws are the scaled ones."""
    unfit = {"min_std": 5.0, "max_std": 6.0}
    options = {"method": "tfb", "steps": 12, "temperature_scaling": True, "validation": 0.5, **unfit}
    run = runs.train(config(several(10), **options), progress=False)
    fitted = run.training["rescaling"]
    assert fitted["width"] != 1
    names = ("temperature", "temperature_of_mean", "width")
    assert run.scales == {name: fitted[name] for name in names}
    loaded = runs.load_run(run.config.output)
    assert torch.equal(loaded.predict(queries(), 3).log_probs, run.predict(queries(), 3).log_probs)
    # In a script that knows of no run the folder's adapter says the same.
    alone = bloblora.load(load_model(run.config.model, num_labels=2), run.config.output)
    examples = [run.task.encode(record, run.tokenizer) for record in queries()]
    found = bloblora.predict(alone, examples, 3, task=run.task)
    torch.testing.assert_close(found.probabilities, run.predict(queries(), 3).probabilities, rtol=0, atol=1e-4)
    metrics = runs.evaluate(loaded, queries() * 5, options=runs.PredictionOptions(samples=10))
    assert (metrics["temperature"], metrics["width"]) == (fitted["temperature"], fitted["width"])
    card = str(model_card(run.config.output))
    assert f"| temperature T of the logits | {fitted['temperature']:.4g}" in card
    assert f"| scale τ of the width | {fitted['width']:.4g}" in card
    settings = Settings(samples=3)
    with serving(load_hosted(open_hosted([run.config.output], settings), settings), settings) as client:
        (model,) = client.get("/v1/models").json()["models"]
        answers = client.post("/v1/predict", json={"inputs": [{"text": r["text"]} for r in queries()]}).json()[
            "answers"
        ]
    assert (model["temperature"], model["width"]) == (fitted["temperature"], fitted["width"])
    served = torch.tensor([[answer["probabilities"][label] for label in run.task.labels] for answer in answers])
    torch.testing.assert_close(served, run.predict(queries(), 3).probabilities, rtol=1e-4, atol=1e-6)


@few
def test_a_run_with_folds_is_the_run_without_and_goes_on_where_it_was(config, tmp_path, capfd):
    plain = runs.train(config(save_steps=2), progress=False)
    whole = config(save_steps=2).with_options(output=str(tmp_path / "folds"), temperature_folds=2)
    expected = runs.train(whole)
    assert expected.adapter_sha256 == plain.adapter_sha256  # all records, and the same noise
    assert expected.training["num_examples"] == expected.training["rescaling"]["num_records"] == 8
    assert "fold 1 of 2" in capfd.readouterr().err
    stopped = whole.with_options(output=str(tmp_path / "stopped"))
    for after, resumed in ((7, None), (3, "checkpoint-2")):  # in the second fold, and in the last training
        with pytest.raises(Stop):
            runs.train(stopped, progress=False, callbacks=[Interrupt(after)])
        assert (tmp_path / "stopped/checkpoints/fold_2_of_2/checkpoint-2").is_dir() or resumed
    found = runs.train(stopped, progress=False)
    assert found.training["rescaling"] == expected.training["rescaling"]
    assert torch.equal(found.predict(queries(), 3).log_probs, expected.predict(queries(), 3).log_probs)


@few
def test_folds_over_a_cached_trunk(config, tmp_path):
    """A fold's model has the trunk of the run's."""
    plain = config(temperature_folds=2, top_blocks=1, head="trained")
    cached = plain.with_options(output=str(tmp_path / "cached"), trunk_cache=str(tmp_path / "cache"))
    expected, found = (runs.train(c, progress=False).training["rescaling"] for c in (plain, cached))
    assert found["nll_before"] == pytest.approx(expected["nll_before"], rel=1e-4)


@few
@pytest.mark.parametrize("method", ["ensemble", "swag", "scalabl", "c-lora", "laplace-lora", "mc-dropout", "full"])
def test_folds_of_other_methods(method, config):
    options = {"ensemble": {"members": 2}, "laplace-lora": {"prior_precision": 30.0}}.get(method, {})
    run = runs.train(config(temperature_folds=2, method=method, **options), progress=False)
    assert ("width" in run.training["rescaling"]) == (method in ("swag", "scalabl", "laplace-lora"))
    loaded = runs.load_run(run.config.output)
    assert torch.equal(loaded.predict(queries(), 3).log_probs, run.predict(queries(), 3).log_probs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature_folds": 1}, "temperature_folds must be at least 2, got 1"),
        (
            {"temperature_folds": 2, "temperature_scaling": True, "validation": 0.5},
            "both fit a temperature; leave one of them out",
        ),
        (
            {"temperature_folds": 2, "method": "tfb", "start_from": "runs/a"},
            "temperature_folds: nothing is trained with start_from and method 'tfb'",
        ),
    ],
)
def test_what_cannot_be_cross_validated(options, message, config):
    with pytest.raises(runs.RunError, match=message):
        config(**options)


def test_more_folds_than_records(config):
    with pytest.raises(runs.RunError, match="temperature_folds 9: must be at most the number of records, 8"):
        runs.train(config(temperature_folds=9), progress=False)


@pytest.mark.parametrize("option", [{"temperature_folds": 2}, {"temperature_scaling": True, "validation": 0.5}])
def test_few_records_are_said_to_be_few_before_the_model_is_loaded(option, config, monkeypatch):
    monkeypatch.setattr(runs.train.__globals__["models"], "load_tokenizer", lambda _, **__: (_ for _ in ()).throw(Stop))
    count = 9 if "temperature_folds" in option else 4
    records = [*queries() * 2, {"text": "hello", "label": "other"}]
    with pytest.warns(UserWarning, match="too few for a temperature") as warned, pytest.raises(Stop):
        runs.train(config(records, **option), progress=False)
    messages = [str(warning.message) for warning in warned]
    assert any(f"{count} records are too few for a temperature" in message for message in messages)
    assert any("labels with one record" in m and "other" in m for m in messages) == ("temperature_folds" in option)
