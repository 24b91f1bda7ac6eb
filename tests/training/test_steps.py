"""What a training step does to the weights, against a loop written by hand with torch.optim and torch.distributions."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl
from transformers import TrainerCallback

from bloblora import find_posterior
from bloblora.posterior import ESTIMATORS

from .conftest import TASK, assert_close, classifier, examples, logs, make_trainer, trainable

PRIOR_STD = 0.2


def closed_form_kl(posterior):
    pairs = zip(posterior.named_means().values(), posterior.named_std_parameters().values(), strict=True)
    return sum(torch_kl(Normal(m, g**2), Normal(0.0, PRIOR_STD)).sum() for m, g in pairs)


def by_hand(model, batches, kl_weights, *, style="joint", lr=0.01, kl_lr=0.01, draws=1, seed=42, expects=True):
    """One pass over ``batches`` with AdamW and a linear schedule; returns what the trainer should log."""
    posterior = find_posterior(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gaussians = [*posterior.named_means().values(), *posterior.named_std_parameters().values()]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0)
    posterior.batch.expects_labels = expects
    squares = posterior.config.fisher(expects)
    torch.manual_seed(seed)
    torch.empty((), dtype=torch.int64).random_()  # a DataLoader draws the seed of its workers when a pass begins
    model.train()
    logged = []
    for i, (batch, weight) in enumerate(zip(batches, kl_weights, strict=True)):
        schedule = 1 - i / len(batches)
        optimizer.param_groups[0]["lr"] = lr * schedule
        inputs, labels = {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
        optimizer.zero_grad()
        nll = 0
        for _ in range(draws):
            logits = model(**inputs).logits
            nll += F.cross_entropy(logits, labels) / draws
            if squares:  # E‖p - e_y‖² of labels from p, over that of the labels
                p = logits.detach().softmax(-1)
                expected = (p * (1 - p)).sum(-1)
                posterior.batch.squares *= expected / (p - F.one_hot(labels, 3)).square().sum(-1)
        nll.backward()
        for parameter in posterior.named_std_parameters().values():  # squares of a gradient that has 1/draws in it
            parameter.grad *= draws if squares else 1
        if style == "joint":
            (weight * closed_form_kl(posterior)).backward()
        optimizer.step()
        if style == "paper":
            gradients = torch.autograd.grad(weight * closed_form_kl(posterior), gaussians)
            with torch.no_grad():
                for parameter, gradient in zip(gaussians, gradients, strict=True):
                    parameter -= kl_lr * schedule * gradient
        elif style == "paper_flow":
            posterior.flow_(weight * kl_lr * schedule)
        stds = torch.cat([g.detach().flatten() ** 2 for g in posterior.named_std_parameters().values()])
        kl = closed_form_kl(posterior).item()
        logged.append(
            {
                "nll": nll.item(),
                "kl": kl,
                "kl_weight": weight,
                "elbo": -(nll.item() + weight * kl),
                "median_std": stds.median().item(),
                "share_at_prior": ((stds - PRIOR_STD).abs() < 0.05 * PRIOR_STD).float().mean().item(),
            }
        )
    return logged


def batches(count, size=4):
    data = examples(count)
    return [TASK.collate(data[i : i + size]) for i in range(0, count, size)]


@pytest.mark.parametrize("style", ["joint", "paper", "paper_flow"])
@pytest.mark.parametrize("weighting", ["uniform", "reweighted"])
@pytest.mark.parametrize(
    ("estimator", "std_gradient", "draws"),
    [*((e, "auto", 1) for e in ESTIMATORS), ("flipout", "reparameterization", 1)]
    + [("independent", how, 3) for how in ("auto", "reparameterization")],
)
def test_steps_and_logs_equal_a_loop_by_hand(tmp_path, style, weighting, estimator, std_gradient, draws):
    """Ten examples in batches of four: the last batch of the pass has two."""
    # Ω of 0.19 to 0.38, so that the noise matters and some entries are at the prior.
    noise = dict(estimator=estimator, std_gradient=std_gradient, init_std=0.3844)
    model, expected = (classifier(**noise) for _ in range(2))
    weights = [1 / 10] * 3 if weighting == "uniform" else [1 / 7, 2 / 7, 4 / 7]
    options = dict(optimizer_style=style, kl_weighting=weighting, num_weight_draws=draws)
    trainer = make_trainer(tmp_path, model, 10, train_sampling_strategy="sequential", **options)
    trainer.train()
    logged = by_hand(expected, batches(10), weights, style=style, draws=draws)
    assert_close(trainable(model), trainable(expected), rtol=1e-4, atol=1e-6)
    for key in logged[0]:
        assert logs(trainer, key) == pytest.approx([row[key] for row in logged], rel=1e-4)
    assert 0 < logged[0]["share_at_prior"] < 1


def test_the_kl_step_moves_the_mean_and_the_std_alone(tmp_path):
    model = classifier()
    before, posterior = trainable(model), find_posterior(model)
    make_trainer(tmp_path, model, max_steps=1, learning_rate=0.0, optimizer_style="paper").train()
    moved = {name for name, after in trainable(model).items() if not torch.equal(after, before[name])}
    gaussians = {id(p) for p in (*posterior.named_means().values(), *posterior.named_std_parameters().values())}
    assert moved == {name for name, p in model.named_parameters() if id(p) in gaussians}
    assert len(moved) == 8


@pytest.mark.parametrize("prior", ["normal", "student_t"])
@pytest.mark.parametrize("style", ["joint", "paper", "paper_flow"])
def test_what_is_frozen_stays(tmp_path, style, prior):
    """Not by the KL either: M of the first layer, and Ω of the second."""
    model = classifier(prior=prior)
    posterior = find_posterior(model)
    for named, layer in ((posterior.named_means(), "layers.0"), (posterior.named_std_parameters(), "layers.1")):
        for name, parameter in named.items():
            parameter.requires_grad_(layer not in name)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make_trainer(tmp_path, model, optimizer_style=style, std_learning_rate="auto").train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trainable(model).keys()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(), [Fraction(1, 10)] * 3),
        (dict(kl_scale=0.5), [Fraction(1, 20)] * 3),
        (dict(kl_scale="auto"), [Fraction(1, 100)] * 3),
        # The paper's λ_i, which over a pass sum to 1.
        (dict(kl_weighting="reweighted"), [Fraction(i, 7) for i in (1, 2, 4)]),
        (dict(kl_weighting="reweighted", kl_scale=0.5), [Fraction(i, 14) for i in (1, 2, 4)]),
        # Without the last part batch a pass has two steps, and the third step begins the next pass.
        (dict(kl_weighting="reweighted", dataloader_drop_last=True), [Fraction(i, 3) for i in (1, 2, 1)]),
        (dict(kl_weighting="reweighted", gradient_accumulation_steps=3), [1] * 3),
        (dict(dataset_size=1000), [Fraction(1, 1000)] * 3),
        # 100·10^(π/4) = 610.1 (to ten digits 610.0966339), the pseudo size.
        (dict(dataset_rescaling=True, gamma=4.0), [1 / 610.0966339] * 3),
    ],
)
def test_weights_of_the_kl_over_a_pass(tmp_path, options, expected):
    trainer = make_trainer(tmp_path, data=10, **options)
    trainer.train()
    assert logs(trainer, "kl_weight") == pytest.approx([float(weight) for weight in expected], rel=1e-5)


def test_a_kl_scale_of_zero_leaves_the_nll(tmp_path):
    """The std gets no pull towards the prior: with the mean alone in use it stays where it is."""
    for style in ("joint", "paper"):
        model = classifier()
        trainer = make_trainer(tmp_path, model, kl_scale=0, optimizer_style=style)
        before = trainable(model)
        with trainer.posterior.mean(), pytest.warns(UserWarning, match="has not left its start"):
            trainer.train()
        after = trainable(model)
        assert [n for n in before if "std" in n and not torch.equal(before[n], after[n])] == []
        assert [n for n in before if "std" not in n and torch.equal(before[n], after[n])] == []


def test_all_gradients_but_those_of_the_stds_are_clipped(tmp_path):
    moved = []
    for norm in (0.0, 1e-3):
        model = classifier(init_std=0.25)
        before = trainable(model)
        options = dict(optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_steps=1, max_grad_norm=norm)
        make_trainer(tmp_path, model, train_sampling_strategy="sequential", **options).train()
        moved.append({name: after - before[name] for name, after in trainable(model).items()})
    free, clipped = moved
    own = {name for name in free if "std" in name}
    assert_close({n: clipped[n] for n in own}, {n: free[n] for n in own}, rtol=1e-5, atol=1e-7)
    others = torch.cat([clipped[n].flatten() for n in free.keys() - own])
    assert others.norm().item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("style", ["joint", "paper"])
def test_accumulated_gradients_equal_one_big_batch(tmp_path, style):
    """Without noise; plain SGD, which unlike AdamW would show a KL that is counted once a micro-batch."""
    options = dict(optim="sgd", learning_rate=0.05, optimizer_style=style, train_sampling_strategy="sequential")
    results = []
    for size, accumulation in ((8, 1), (2, 4)):
        model = classifier(init_std=0.25)
        trainer = make_trainer(
            tmp_path, model, 20, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, **options
        )
        with trainer.posterior.mean():
            trainer.train()
        results.append((trainable(model), {k: logs(trainer, k) for k in ("loss", "nll", "kl", "kl_weight", "elbo")}))
    assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    for key, values in results[0][1].items():
        assert results[1][1][key] == pytest.approx(values, rel=1e-5), key


def test_logs_of_several_steps_are_their_means(tmp_path):
    """The third log's interval crosses into the second pass; `reweighted` makes the weights differ."""
    options = dict(max_steps=6, kl_weighting="reweighted", train_sampling_strategy="sequential")
    each, every_two = (make_trainer(tmp_path, logging_steps=n, **options) for n in (1, 2))
    for trainer in (each, every_two):
        trainer.train()
    for key in ("nll", "kl_weight"):
        values = logs(each, key)
        expected = [(a + b) / 2 for a, b in zip(values[::2], values[1::2], strict=True)]
        assert logs(every_two, key) == pytest.approx(expected)
    assert logs(every_two, "kl") == logs(each, "kl")[1::2]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("style", ["joint", "paper"])
def test_mixed_precision(tmp_path, estimator, style):
    """bfloat16 in the forward; the posterior and its KL stay float32 and near a float32 training's."""
    results = {}
    for bf16 in (False, True):
        model = classifier(estimator=estimator, init_std=0.25)
        trainer = make_trainer(tmp_path, model, bf16=bf16, optimizer_style=style)
        trainer.train()
        assert {p.dtype for p in trainable(model).values()} == {torch.float32}
        assert all(torch.isfinite(p).all() for p in trainable(model).values())
        results[bf16] = logs(trainer, "nll"), logs(trainer, "kl")
    assert results[True][0] != results[False][0]  # bfloat16 was really used
    assert results[True][0] == pytest.approx(results[False][0], rel=0.05)
    assert results[True][1] == pytest.approx(results[False][1], rel=0.01)


def test_weight_decay_spares_the_std(tmp_path):
    trainer = make_trainer(tmp_path, weight_decay=0.5)
    trainer.create_optimizer()
    decay = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {decay[id(p)] for p in trainer.posterior.named_std_parameters().values()} == {0.0}
    assert {decay[id(p)] for n, p in trainer.model.named_parameters() if "lora_" in n} == {0.5}


class Gradients(TrainerCallback):
    """Those of M and of Ω's parameter, flat, of each step."""

    def __init__(self, posterior):
        self.posterior, self.seen = posterior, []

    def on_pre_optimizer_step(self, *_, **__):
        self.seen.append([torch.cat([p.grad.double().flatten() for p in side]) for side in self.posterior.parameters()])


@pytest.mark.parametrize("options", [dict(gradient_accumulation_steps=2), dict(num_weight_draws=2)])
def test_squares_of_a_divided_loss_are_those_of_the_loss(tmp_path, options):
    """With an Ω that is no noise: whichever way a batch of eight is computed, Ω's gradient is the same."""
    found = []
    for extra in ({}, options):
        model = classifier(init_std=1e-6)
        posterior, generator = find_posterior(model), torch.Generator().manual_seed(0)
        for layer in posterior.named_layers().values():
            layer.lora_B["default"].weight.data.normal_(generator=generator)
        gradients = Gradients(posterior)
        batch = 8 // extra.get("gradient_accumulation_steps", 1)
        arguments = dict(max_steps=1, per_device_train_batch_size=batch, kl_scale=0.0, **extra)
        make_trainer(
            tmp_path, model, 8, callbacks=[gradients], train_sampling_strategy="sequential", **arguments
        ).train()
        found.append(gradients.seen[0][1])
    expected, divided = found
    assert (expected > 0).all()
    torch.testing.assert_close(divided, expected, rtol=0.01, atol=expected.max().item() / 1000)


@pytest.mark.parametrize("options", [dict(gradient_accumulation_steps=2), dict(num_weight_draws=2)])
def test_a_bounded_head_has_the_gradient_of_the_whole_loss(tmp_path, options):
    """However a batch of eight is computed; there are no squares in it to be made those of the whole loss."""
    found = []
    for extra in ({}, options):
        gradients = Gradients(find_posterior(model := classifier(head_prior_std=0.3, factors="none", init_std=0.1)))
        batch = 8 // extra.get("gradient_accumulation_steps", 1)
        arguments = dict(max_steps=1, per_device_train_batch_size=batch, head_kl_scale=0.0, **extra)
        trainer = make_trainer(
            tmp_path, model, 8, callbacks=[gradients], train_sampling_strategy="sequential", **arguments
        )
        trainer.train()
        found.append(gradients.seen[0])
    for divided, expected in zip(found[1], found[0], strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(divided, expected, rtol=1e-4, atol=1e-6)


def test_a_kl_of_many_weights_is_not_too_small_for_adam(tmp_path):
    """With B = 0 the data say nothing of Ω; a KL that weighs 1e-9 a weight moves it at its rate: 0.02 · (1 + ⅔ + ⅓)."""
    model = classifier(std_parameterization="log", init_std=0.01)
    posterior = find_posterior(model)
    for layer in posterior.named_layers().values():
        torch.nn.init.zeros_(layer.lora_B["default"].weight)
    before = {name: std.detach().clone() for name, std in posterior.named_stds().items()}
    make_trainer(tmp_path, model, learning_rate=1e-12, std_learning_rate=0.02, kl_scale=1.2e-8).train()
    for name, after in posterior.named_stds().items():
        torch.testing.assert_close((after / before[name]).log(), torch.full_like(after, 0.04), rtol=1e-3, atol=0)


@pytest.mark.parametrize("std_learning_rate", [None, 0.02])
def test_drift_is_that_of_the_gradients(tmp_path, std_learning_rate):
    """Against Adam's averages of the recorded gradients; the first step has only one direction."""
    model = classifier(init_std=0.3)
    gradients = Gradients(find_posterior(model))
    trainer = make_trainer(tmp_path, model, callbacks=[gradients], max_steps=6, std_learning_rate=std_learning_rate)
    trainer.train()
    for side, name in enumerate(("drift_mean", "drift_std")):
        first = second = 0.0
        for step, drift in enumerate(logs(trainer, name), start=1):
            gradient = gradients.seen[step - 1][side]
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient.square()
            ratio = (first / (1 - 0.9**step)).square() / (second / (1 - 0.999**step))
            assert drift == pytest.approx(math.sqrt(19 * ratio.mean()), rel=1e-4)
        assert step == 6
        assert logs(trainer, name)[0] == pytest.approx(math.sqrt(19), rel=1e-4)


@pytest.mark.parametrize(
    ("bayesian", "options"), [(True, dict(optim="sgd")), (True, dict(optimizer_style="paper")), (False, dict())]
)
def test_drift_needs_adams_averages_of_the_whole_gradient(tmp_path, bayesian, options):
    trainer = make_trainer(tmp_path, classifier(bayesian), **options)
    trainer.train()
    assert trainer.drift() == {}
    assert logs(trainer, "drift_mean") == logs(trainer, "drift_std") == []


@pytest.mark.parametrize("style", ["paper", "paper_flow"])
def test_a_learning_rate_of_the_std_is_for_joint_only(tmp_path, style):
    ends = []
    for rate in (None, 0.5):
        model = classifier()
        trainer = make_trainer(tmp_path, model, optimizer_style=style, std_learning_rate=rate)
        trainer.train()
        assert len(trainer.optimizer.param_groups) == 2
        ends.append(trainable(model))
    assert_close(ends[1], ends[0], rtol=0, atol=0)


def test_std_has_a_learning_rate_of_its_own(tmp_path):
    """AdamW's first step is the learning rate's size; a resumed training ends where an uninterrupted one does."""
    options = dict(std_learning_rate=0.02, learning_rate=0.005, max_steps=2, save_strategy="steps", save_steps=1)
    ends = []
    for folder in ("whole", "resumed"):
        model = classifier(std_parameterization="log")
        start = torch.cat([p.detach().flatten() for p in find_posterior(model).parameters()[1]])
        trainer = make_trainer(tmp_path / folder, model, lr_scheduler_type="constant", **options)
        if folder == "resumed":
            trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
        else:
            trainer.train()
        assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.005, 0.005, 0.02]
        ends.append(trainable(model))
        moved = torch.cat([p.detach().flatten() for p in find_posterior(model).parameters()[1]]) - start
        assert 0.005 < moved.abs().median() <= 0.0401
    assert_close(ends[1], ends[0], rtol=0, atol=0)
