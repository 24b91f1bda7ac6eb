"""What holds for every method: it goes through a run, comes back with the same bits, and its draws are functions."""

import pytest
import torch

from bloblora import runs, tasks
from bloblora.methods import METHODS
from bloblora.posterior import PRIORS
from bloblora.prediction import StoppingRule, predict
from tests.tiny_base import QUESTIONS, queries, write_jsonl

from .interrupt import Interrupt, Stop

# What makes a method's draws few or its training longer than here.
OPTIONS = {
    "ensemble": {"members": 2},
    "mixture": {"members": 2},
    "laplace-lora": {"holdout": 0.5},
    "distilled": {"distill_steps": 4},
}
POINTS = {name for name, method in METHODS.items() if method.deterministic}
TWO_PARTS = {"ensemble", "mixture", "distilled"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(base, tmp_path):
    def build(method, records):
        return runs.RunConfig.of(
            data=str(write_jsonl(tmp_path / "data.jsonl", records)),
            output=str(tmp_path / "run"),
            model=str(base),
            method=method,
            steps=4,
            batch_size=2,
            save_steps=2,
            r=2,
            learning_rate=0.05,
            **OPTIONS.get(method, {}),
        )

    return build


def unlabelled(records):
    return [{k: v for k, v in record.items() if k not in ("label", "answer")} for record in records]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("records", [queries() * 2, QUESTIONS * 2], ids=["texts", "questions"])
def test_a_run_comes_back_and_its_draws_are_functions(method, records, config):
    head = {"factors": "none"} if "label" in records[0] and method in ("blob", "mixture") else {}
    run = runs.train(config(method, records).with_options(**head), progress=False)
    inputs = unlabelled(records[: len(records) // 2])
    before = run.predict(inputs, 3, seed=5)
    loaded = runs.load_run(run.config.output)
    assert torch.equal(loaded.predict(inputs, 3, seed=5).log_probs, before.log_probs)
    one_head = head and method == "blob"  # whose mean is known
    members = method == "ensemble" or (method == "mixture" and head)  # no more functions than these
    expected = 1 if method in POINTS or one_head else 2 if members else 3
    assert len(before.log_probs) == expected
    assert not torch.equal(before.log_probs[0], before.log_probs[-1]) or expected == 1
    alone = torch.cat(
        [loaded.predict([record], 3, seed=5).probabilities[:, : len(before.probabilities[0])] for record in inputs[:1]]
    )
    torch.testing.assert_close(alone[0], before.probabilities[0][: alone.shape[1]], rtol=1e-4, atol=1e-5)
    assert loaded.predict(inputs, 0).log_probs.shape[0] == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_training_ends_with_the_same_bits(method, config, tmp_path):
    whole = config(method, queries() * 2)
    expected = runs.train(whole, progress=False)
    stopped = whole.with_options(output=str(tmp_path / "stopped"))
    for after in (3, 3):  # in the first part, and in the second where there is one
        with pytest.raises(Stop):
            runs.train(stopped, progress=False, callbacks=[Interrupt(after)])
        if method not in TWO_PARTS:
            break
    found = runs.train(stopped, progress=False)
    inputs = unlabelled(queries())
    assert torch.equal(found.predict(inputs, 3).log_probs, expected.predict(inputs, 3).log_probs)


def test_draws_of_one_forward_stop_where_an_answer_is_settled(config):
    options = {"learning_rate": 1e-3, "prior_precision": 30.0, "holdout": 0.0, "template": "{text}"}
    run = runs.train(config("laplace-lora", queries()).with_options(**options), progress=False)
    examples, given = tasks.encode_all(run.task, queries(), run.tokenizer), {"task": run.task, "sampler": run.sampler}
    whole = predict(run.model, examples, 40, **given).log_probs
    stopped = predict(run.model, examples, 40, stop=StoppingRule(0.2, 0.1), **given)
    assert len(stopped.num_draws.unique()) > 1
    made = (stopped.log_probs > -torch.inf).all(-1)
    assert torch.equal(stopped.log_probs[made], whole[: len(made)][made])


def test_an_option_of_another_method_is_named(config):
    with pytest.raises(runs.RunError, match=r"method 'lora' has no option 'members'; it is of ensemble, mixture"):
        config("lora", queries()).with_options(members=3)


@pytest.mark.parametrize(
    ("method", "option", "value", "message"),
    [
        ("map", "prior_std", 0.0, "prior_std must be a finite number above 0, got 0.0"),
        ("mc-dropout", "lora_dropout", 0.0, r"lora_dropout must be in \(0, 1\) for method 'mc-dropout', got 0.0"),
        ("ivon", "fp16", True, "fp16 must be false for method 'ivon'"),
        ("tfb", "min_std", 0.2, "min_std must be below max_std 0.2, got 0.2"),
        ("tfb", "subset_of_weights", "head", "subset_of_weights must be one of all, last_layer, got 'head'"),
        ("scalabl", "kl_weighting", "late", "kl_weighting must be one of uniform, reweighted, got 'late'"),
        ("swag", "burn_in", 1.0, r"burn_in must be in \[0, 1\), got 1.0"),
        ("swag", "steps", 1, "max_steps is 1; method 'swag' needs at least 2"),
        ("swag", "covariance_rank", 1, "covariance_rank must be 0, or at least 2, got 1"),
        ("swag", "collect_schedule", "cosine", "collect_schedule must be one of constant, cyclical, got 'cosine'"),
        ("swag", "lr_scheduler_type", "linear", "lr_scheduler_type must be 'constant_with_warmup' for method 'swag'"),
        ("ensemble", "members", 1, "members must be a whole number of at least 2, got 1"),
        ("laplace-lora", "subset_of_weights", "last", "subset_of_weights must be one of all, last_layer, got 'last'"),
        ("blob", "prior_std", -1.0, "prior_std must be a finite number above 0, got -1.0"),
    ],
)
def test_an_option_out_of_its_range(method, option, value, message, config):
    with pytest.raises(runs.RunError, match=message):
        config(method, queries()).with_options(**{option: value})


@pytest.mark.parametrize("method", ["blob", "ensemble", "tfb"])
def test_a_temperature_on_top_of_another_method(method, config):
    plain = config(method, queries() * 2)
    options = {"temperature_scaling": True, "validation": 0.5, "save_steps": None}
    scaled = plain.with_options(**options, output=f"{plain.output}-scaled")
    run = runs.train(scaled, progress=False)
    assert run.training["num_examples"] == len(queries())  # the other half is held out
    inputs = unlabelled(queries())
    before = run.predict(inputs, 3)
    # dividing the inner method's logits by T is what the scaled one does
    options = {"task": run.task, "sampler": run.sampler.sampler}
    num_samples = 0 if run.scales.get("width") == 0 else 3  # without width all draws are the mean
    inner = predict(run.model, tasks.encode_all(run.task, inputs, run.tokenizer), num_samples, **options).log_probs
    torch.testing.assert_close((inner / run.sampler.temperature).log_softmax(-1), before.log_probs)
    loaded = runs.load_run(scaled.output)
    assert loaded.sampler.temperature == run.sampler.temperature
    assert torch.equal(loaded.predict(inputs, 3).log_probs, before.log_probs)


@pytest.mark.parametrize("method", METHODS)
def test_a_temperature_leaves_what_a_method_declares(method, config):
    options = {"temperature_scaling": True, "validation": 0.5, "save_steps": None}
    scaled = config(method, queries()).with_options(method={"name": method}, **options)
    inner, outer = METHODS[method], scaled.build_method()
    for name in ("name", "starts_from_lora", "post_hoc", "whole_model", "gaussian", "deterministic"):
        assert getattr(outer, name) == getattr(inner, name)
    assert not outer.writes_text


@pytest.mark.parametrize("style", ["paper_flow", "paper", "joint"])
@pytest.mark.parametrize("prior", PRIORS)
def test_every_prior_in_a_training(prior, style, config):
    start = config("blob", queries() * 2)
    options = {"prior": prior, "optimizer_style": style, "kl_learning_rate": 0.01}
    options |= {"std_parameterization": "square"} if style == "paper_flow" else {}
    run = runs.train(start.with_options(**options), progress=False)
    posterior = runs.load_run(start.output).sampler.weights
    assert (posterior.config.prior, type(posterior.prior)) == (prior, PRIORS[prior])
    assert run.training["final"]["kl"] > 0
    # its summary draws no noise from the generator that training uses
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    posterior.summary()
    assert torch.equal(torch.rand(1), expected)


def test_an_unknown_prior_is_named(config):
    with pytest.raises(runs.RunError, match=r"prior 'cauchy' is not one of normal, laplace, "):
        config("blob", queries()).with_options(prior="cauchy")
