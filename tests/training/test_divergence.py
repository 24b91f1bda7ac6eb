"""Trainings that diverge, and posteriors that say nothing."""

import warnings

import pytest
import torch
from transformers import TrainerCallback

from bloblora import BlobTrainer, find_posterior
from bloblora.training import DivergedError, last_checkpoint

from .conftest import TASK, arguments, classifier, examples, make_trainer
from .test_plain import language_model, texts

LAYER = "base_model.model.model.layers.1.self_attn.q_proj"
SAVE = dict(save_strategy="steps", save_steps=1, save_total_limit=1, max_steps=6)


class Poison(TrainerCallback):
    """Writes ``value`` into one entry of a weight when ``event`` comes at ``step`` finished steps."""

    def __init__(self, event: str, step: int, weight: str, value: float = torch.nan) -> None:
        self.step, self.weight, self.value = step, weight, value
        setattr(self, event, self.write)

    @torch.no_grad()
    def write(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            model.get_parameter(self.weight).view(-1)[5] = self.value


def diverge(trainer, step: int) -> str:
    with pytest.raises(DivergedError, match=f"is not finite at step {step}, ") as caught:
        trainer.train()
    return str(caught.value)


@pytest.mark.parametrize("style", ["joint", "paper"])
def test_a_learning_rate_beyond_reason(tmp_path, style):
    """The first step leaves weights of 1e30: products overflow in the second, but before that Ω in the KL step."""
    trainer = make_trainer(tmp_path, learning_rate=1e30, std_learning_rate=0.02, optimizer_style=style)
    message = diverge(trainer, step=2 if style == "joint" else 1)
    assert message.startswith("the loss is not finite")
    assert "learning_rate 1e+30" in message
    assert "init_std 0.0025 is too high; halve it" in message
    assert ("kl_learning_rate 0.01" in message) == (style == "paper")
    assert ("std_learning_rate 0.02" in message) == (style == "joint")
    assert f"resume from the last checkpoint in {tmp_path}" in message
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    place = f"in the KL of {layer}.lora_A: " if style == "paper" else f"first in the output of {layer}.lora_B.default."
    assert place in message


@pytest.mark.parametrize("style", ["joint", "paper"])
@pytest.mark.parametrize("weight", [f"{LAYER}.lora_A.default.weight", f"{LAYER}.blob_std_parameter_A.default"])
def test_a_poisoned_weight_is_named_and_the_last_checkpoint_stays(tmp_path, style, weight):
    poison = Poison("on_step_begin", 3, weight)
    message = diverge(make_trainer(tmp_path, callbacks=[poison], optimizer_style=style, **SAVE), step=4)
    assert f"the loss is not finite at step 4, first in the weight {weight}." in message
    assert last_checkpoint(tmp_path).name == "checkpoint-3"


def test_weights_that_are_not_finite_replace_no_checkpoint(tmp_path):
    weight = f"{LAYER}.lora_B.default.weight"
    poison = Poison("on_step_end", 3, weight, torch.inf)
    message = diverge(make_trainer(tmp_path, callbacks=[poison], **SAVE), step=3)
    assert message.startswith(f"a weight is not finite at step 3, first in {weight}.")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    resumed = make_trainer(tmp_path, **SAVE)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6


def test_the_last_step_is_looked_at_too(tmp_path):
    poison = Poison("on_step_end", 3, f"{LAYER}.lora_B.default.weight")
    assert diverge(make_trainer(tmp_path, callbacks=[poison]), step=3).startswith("a weight is not finite")


@pytest.mark.parametrize(("style", "event"), [("joint", "on_step_begin"), ("paper", "on_optimizer_step")])
def test_a_std_of_zero_is_found_in_the_kl(tmp_path, style, event):
    poison = Poison(event, 1, f"{LAYER}.blob_std_parameter_A.default", 0.0)
    message = diverge(make_trainer(tmp_path, callbacks=[poison], optimizer_style=style), step=2)
    assert f"in the KL of {LAYER}.lora_A: an entry of Ω is 0" in message


@pytest.mark.parametrize(("max_grad_norm", "accumulation"), [(0, 1), (1.0, 2)])
def test_a_gradient_is_named_though_the_loss_is_finite(tmp_path, max_grad_norm, accumulation):
    model = classifier()
    weight = f"{LAYER}.lora_A.default.weight"
    model.get_parameter(weight).register_hook(lambda gradient: gradient * torch.nan)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = make_trainer(
        tmp_path, model, max_grad_norm=max_grad_norm, gradient_accumulation_steps=accumulation, num_train_epochs=1
    )
    message = diverge(trainer, step=1)
    assert message.startswith(f"a gradient is not finite at step 1, in {weight}.")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_layer_where_the_gradient_broke_is_named_not_those_that_it_then_reached(tmp_path):
    """From layer 1 it flows on into layer 0."""
    model = classifier()
    layer = model.get_submodule(f"{LAYER}.lora_B.default")

    def break_gradient(module, inputs, output):
        output.register_hook(lambda gradient: gradient * torch.nan)

    layer.register_forward_hook(break_gradient)
    assert f"a gradient is not finite at step 1, in {LAYER}." in diverge(make_trainer(tmp_path, model), step=1)
    bad = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.isnan().any()]
    assert any("layers.0" in name for name in bad)


def test_a_base_weight_is_found_by_what_it_makes(tmp_path):
    model = classifier()
    with torch.no_grad():
        model.get_parameter("base_model.model.model.layers.1.mlp.up_proj.weight")[0, 0] = torch.inf
    message = diverge(make_trainer(tmp_path, model), step=1)
    assert "first in the output of base_model.model.model.layers.1.mlp.up_proj. The learning rate has no" in message
    assert "float16" not in message


def test_a_base_that_overflows_is_not_a_learning_rate(tmp_path):
    model = language_model(bayesian=True)
    for name, weight in model.named_parameters():
        if "up_proj" in name or "gate_proj" in name:
            weight.data *= 5000
        if not weight.requires_grad:
            weight.data = weight.data.half()
    trainer = BlobTrainer(model, arguments(tmp_path, dataset_size=28), train_dataset=texts(4))
    message = diverge(trainer, step=1)
    assert "no step was made: it overflows in float16; load the base model in bfloat16 or float32" in message
    assert "halve" not in message


def test_a_plain_lora_names_no_posterior(tmp_path):
    poison = Poison("on_step_begin", 1, f"{LAYER}.lora_A.default.weight")
    message = diverge(make_trainer(tmp_path, classifier(bayesian=False), callbacks=[poison]), step=2)
    assert "Likely cause: learning_rate 0.01 is too high; halve it" in message


def test_the_trainer_can_train_after_a_divergence(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[Poison("on_step_begin", 1, f"{LAYER}.lora_A.default.weight")], **SAVE)
    diverge(trainer, step=2)
    trainer.pop_callback(Poison)
    trainer.train(resume_from_checkpoint=True)
    assert all(log["nll"] < 10 for log in trainer.state.log_history if "nll" in log)


def about_posterior(caught):
    return [str(w.message) for w in caught if "the posterior " in str(w.message)]


@pytest.mark.parametrize(
    ("factor", "options", "warning"),
    [
        (1e-2, dict(learning_rate=1e-6), "the posterior has collapsed: median Ω is "),
        (1, dict(learning_rate=0.0), "the posterior has not left its start: median Ω is "),
        (1, dict(learning_rate=1e-7), "the posterior has not left its start: median Ω is "),
        (
            1,
            dict(learning_rate=1e-5, optimizer_style="paper_flow", kl_learning_rate=1e3),
            "the posterior is the prior: its KL is 0.00 nats",
        ),
        (1, dict(), None),
    ],
    ids=["collapsed", "never moved", "hardly moved", "the prior", "healthy"],
)
def test_a_posterior_that_says_nothing_is_warned_of(tmp_path, factor, options, warning):
    model = classifier()
    with torch.no_grad():
        for parameter in find_posterior(model).named_std_parameters().values():
            parameter *= factor
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, model, **options).train()
    assert [w[: len(warning or "")] for w in about_posterior(caught)] == [warning] * (warning is not None)


def test_a_posterior_as_wide_as_the_prior_has_learned_if_its_mean_has(tmp_path):
    model = classifier()
    posterior = find_posterior(model)
    with torch.no_grad():
        for parameter in posterior.named_std_parameters().values():
            parameter.fill_(0.2**0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, model, learning_rate=1e-7).train()
    summary, means = posterior.summary(), torch.cat([m.detach().flatten() for m in posterior.named_means().values()])
    assert summary["share_at_prior"] == 1
    assert summary["kl"] == pytest.approx(means.square().sum().item() / (2 * 0.2**2), rel=1e-3)
    assert summary["kl"] > 1
    assert about_posterior(caught) == []


@pytest.mark.parametrize("task", [None, TASK], ids=["model's loss", "task"])
def test_under_a_gaussian_head_it_is_named_as_well(tmp_path, task):
    """Whose bound takes a gradient, also when the forward runs again to look for where."""
    model = classifier(factors="auto", head_prior_std="auto", std_parameterization="log", init_std=None)
    broken = next(name for name, _ in model.named_parameters() if "layers.1.mlp" in name)
    model.get_parameter(broken).data.fill_(torch.inf)
    data = {"train_dataset": examples(4), "data_collator": TASK.collate}
    with pytest.raises(DivergedError, match=f"first in the output of .*{broken.split('.')[-2]}"):
        BlobTrainer(model, arguments(tmp_path), task=task, **data).train()


def test_a_batch_without_a_label_is_no_learning_rate(tmp_path):
    data = [{**row, "label": -100} for row in examples(4)]
    trainer = BlobTrainer(classifier(), arguments(tmp_path), train_dataset=data, data_collator=TASK.collate)
    message = diverge(trainer, 1)
    assert "all labels of a batch are -100" in message
    assert "learning_rate" not in message
