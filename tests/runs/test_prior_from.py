"""Runs whose prior is another run's posterior."""

import sys

import pytest
import torch
from safetensors.torch import load_file

from bloblora import find_posterior, runs
from bloblora.hub import model_card
from bloblora.methods import rescaled
from tests.conftest import OVER_A
from tests.tiny_base import QUESTIONS, queries, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"steps": 4, "batch_size": 4, "r": 2, "learning_rate": 0.01}
STILL = {"learning_rate": 1e-12, "std_learning_rate": 1e-12}


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prior")
    write_jsonl(folder / "texts.jsonl", queries() * 4)
    write_jsonl(folder / "questions.jsonl", QUESTIONS)
    train(folder, base, "yesterday", prior_std=0.1, std_parameterization="softplus", seed=3)
    return folder


def train(folder, base, name, data="texts", **options):
    settings = {**OPTIONS, "data": f"{folder}/{data}.jsonl", "output": f"{folder}/{name}", "model": str(base)}
    return runs.train(runs.RunConfig.of(**{**settings, **options}), progress=False)


def gaussian(posterior):
    means, stds = posterior.named_means(), posterior.named_stds()
    return {name: (means[name].detach(), stds[name].detach()) for name in means}


def assert_gaussians(found, expected):
    for name, pair in expected.items():
        for mine, theirs in zip(found[name], pair, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_yesterdays_posterior_is_todays_prior_and_start(folder, base):
    yesterday = runs.load_run(folder / "yesterday")
    expected = gaussian(find_posterior(yesterday.model))
    options = {"prior_from": str(folder / "yesterday")}
    still = find_posterior(train(folder, base, "still", **options, **STILL).model)
    assert_gaussians(still.named_priors(), expected)
    assert_gaussians(gaussian(still), expected)
    run = train(folder, base, "today", **options, std_learning_rate=0.1)
    assert_gaussians(find_posterior(run.model).named_priors(), expected)
    assert find_posterior(run.model).kl() > 0.1
    for name in ("lora_B", "score"):  # what isn't Gaussian starts there too
        weights = [load_file(folder / which / "adapter_model.safetensors") for which in ("yesterday", "still", "today")]
        key = next(key for key in weights[0] if name in key)
        torch.testing.assert_close(weights[1][key], weights[0][key], rtol=0, atol=1e-6)
        assert (weights[2][key] - weights[0][key]).abs().max() > 1e-4
    (folder / "yesterday").rename(folder / "gone")
    try:
        again = runs.load_run(folder / "today")
    finally:
        (folder / "gone").rename(folder / "yesterday")
    assert torch.equal(find_posterior(again.model).kl(), find_posterior(run.model).kl())
    assert torch.equal(again.predict(queries(), 3).log_probs, run.predict(queries(), 3).log_probs)


@pytest.mark.parametrize("width", [0.25, 0.0])
@pytest.mark.filterwarnings("ignore:temperature_.* records are too few:UserWarning")
def test_a_width_that_predictions_ask_for_is_no_part_of_the_prior(folder, base, monkeypatch, width):
    """τ is undone: a prior of no width would let nothing be learned."""
    monkeypatch.setattr(rescaled, "fit_scales", lambda *_: (rescaled.Scales(1.5, 1.2, width), {"width": width}))
    options = {"prior_std": 0.1, "seed": 3, "validation": 0.25, "temperature_scaling": True}
    scaled = find_posterior(train(folder, base, f"scaled-{width}", **options).model)
    assert runs.load_run(folder / f"scaled-{width}").scales["width"] == width
    assert ("This run has one function" in str(model_card(folder / f"scaled-{width}"))) == (width == 0)
    options = {"prior_from": str(folder / f"scaled-{width}"), "validation": 0.25}
    today = find_posterior(train(folder, base, f"from-{width}", **options, **STILL).model)
    for name, std in scaled.named_stds().items():
        torch.testing.assert_close(today.named_priors()[name][1], std / (width or 1e-6), rtol=1e-3, atol=0)


def test_the_prior_of_a_run_that_starts_from_a_lora(folder, base):
    train(folder, base, "lora", method="lora")
    options = {"start_from": str(folder / "lora"), "prior_mean": "start", "prior_std": "start", **OVER_A}
    posterior = find_posterior(train(folder, base, "from-lora", **options, **STILL).model)
    given = load_file(folder / "lora" / "adapter_model.safetensors")
    for name, (mean, std) in posterior.named_priors().items():
        weight = given[f"{name}.weight"]
        torch.testing.assert_close(mean, weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(std, weight.square().mean().sqrt().expand_as(std))
        assert (posterior.named_stds()[name] <= std / 40 * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior_from": "nowhere"}, "prior_from 'nowhere': there is no such folder; give a run's"),
        ({"prior_from": "{folder}"}, "prior_from: .*: no run.json in it; give a folder that `bloblora train` wrote"),
        ({"start_from": "a"}, "start_from and prior_from both say where the training starts"),
        ({"method": "lora"}, "prior_from isn't for method 'lora'; it is for blob"),
        ({"prior": "laplace"}, "prior must be 'normal' with prior_from, whose posterior is Gaussian, got 'laplace'"),
        ({"prior_std": 0.3}, "prior_std: prior_from says the prior's mean and width"),
        ({"prior_mean": "start"}, "prior_mean: prior_from says"),
        ({"init_std": 0.3}, "init_std: prior_from says"),
        ({"factors": "AB"}, "it has factors A, not AB; give the same"),
        ({"r": 4}, "it has r 2, not 4; give the same"),
        ({"target_modules": ["q_proj"]}, "target_modules: prior_from says which layers are adapted"),
        ({"data": "questions"}, "prior_from .* its task is classification, and the data's choice_text"),
    ],
)
def test_what_does_not_fit_is_said_before_the_model_is_loaded(folder, base, monkeypatch, options, message):
    monkeypatch.setattr(sys.modules["bloblora.runs.train"], "base_model", None)
    options = {"prior_from": str(folder / "yesterday"), **options}
    options["prior_from"] = options["prior_from"].format(folder=folder)
    with pytest.raises(ValueError, match=message):
        train(folder, base, "wrong", **options)
    assert not (folder / "wrong").exists()


@pytest.mark.parametrize("method", ["lora", "swag"])
def test_a_run_without_a_gaussian_of_independent_entries(folder, base, monkeypatch, method):
    train(folder, base, f"as-{method}", method=method)
    monkeypatch.setattr(sys.modules["bloblora.runs.train"], "base_model", None)
    with pytest.raises(runs.RunError, match=f"method '{method}' has no posterior of independent Gaussian entries"):
        train(folder, base, "wrong", prior_from=str(folder / f"as-{method}"))
