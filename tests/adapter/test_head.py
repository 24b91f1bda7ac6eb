"""A Gaussian head against torch.distributions, scipy, the authors' package of VBLL, and Monte Carlo."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.optimize import minimize
from torch import nn
from torch.distributions import Normal, kl_divergence
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import bloblora
from bloblora import BlobConfig, BlobTrainer, bayesianize, find_posterior, runs
from bloblora.adapter import debayesianize
from bloblora.adapter.head import GaussianHead, average_head
from bloblora.methods.blob import Blob
from bloblora.models import load_model
from bloblora.prediction import StoppingRule, average_draws, predict
from bloblora.tasks.likelihood import CATEGORICAL, Categorical
from bloblora.training import BlobTrainingArguments
from tests.methods.test_known_answers import Rows, training
from tests.tiny_base import queries, write_jsonl

SCORE = "base_model.model.score.weight"


class Net(nn.Module):
    """A trunk with a LoRA, and a head."""

    def __init__(self):
        super().__init__()
        self.linear, self.score = nn.Linear(6, 6, bias=False), nn.Linear(6, 3, bias=False)
        self.linear.weight.data.copy_(torch.eye(6))
        self.config = type("Config", (), {"to_dict": lambda self: {}, "model_type": "net"})()

    def forward(self, x):
        return self.score(self.linear(x))


LORA = LoraConfig(r=2, target_modules=["linear"], modules_to_save=["score"])


def net(std=0.3, **config):
    config = {"factors": "A", "head_prior_std": "auto", **config}
    torch.manual_seed(0)
    model = get_peft_model(Net(), LORA)
    posterior = bayesianize(model, BlobConfig(**config))
    posterior.set_stds(std)
    return model, posterior


def tiny(kind, base, factors="A"):
    """A LoRA on a classifier of three labels, with a wide posterior."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    options = dict(num_labels=3, pad_token_id=0, max_position_embeddings=40, **sizes)
    if kind == "llama":
        model = load_model(str(base), num_labels=3)
    elif kind == "bert":
        model = BertForSequenceClassification(BertConfig(**options))
    else:
        model = RobertaForSequenceClassification(RobertaConfig(**options))
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"] if kind == "llama" else ["query"])
    model = get_peft_model(model, lora).eval()
    posterior = bayesianize(model, BlobConfig(factors=factors, head_prior_std="auto"))
    posterior.set_stds(0.3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # at 0 no draw of A would differ
                parameter.normal_(std=0.3)
    return model, posterior


IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
INPUTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
KINDS = ["bert", "roberta", "llama"]
SCORES = {
    "bert": "base_model.model.classifier.weight",
    "roberta": "base_model.model.classifier.out_proj.weight",
    "llama": SCORE,
}


def test_its_kl_is_that_of_torch_with_a_prior_of_its_own():
    _, posterior = net(prior_std=0.7, head_prior_std=0.2)
    expected = []
    for key, width in (("base_model.model.linear.lora_A", 0.7), (SCORE, 0.2)):
        q = Normal(posterior.named_means()[key], posterior.named_stds()[key])
        expected.append(kl_divergence(q, Normal(0.0, width)).sum())
    for found, right in zip(posterior.kls(), expected, strict=True):
        torch.testing.assert_close(found, right)
    torch.testing.assert_close(posterior.kl(), sum(expected))
    torch.testing.assert_close(posterior.named_kls()[SCORE], expected[1])
    means, parameters = posterior.parameters()
    right = torch.autograd.grad(posterior.kl(), [*means, *parameters])
    names, tensors, found = zip(*posterior.kl_gradients(), strict=True)
    assert [*map(id, tensors)] == [*map(id, means), *map(id, parameters)]
    assert [*names] == [*posterior.named_means()] * 2
    for one, gradient in zip(found, right, strict=True):
        torch.testing.assert_close(one, gradient)
    assert posterior.summary()["head_kl"] == pytest.approx(expected[1].item())


def test_the_gaussian_is_over_a_and_where_asked_over_the_head_alone_of_what_gives_labels():
    assert [*bayesianize(get_peft_model(Net(), LORA)).named_means()] == ["base_model.model.linear.lora_A"]
    over_head = BlobConfig(head_prior_std="auto")
    posterior = bayesianize(get_peft_model(Net(), LORA), over_head)
    assert posterior.config.head_prior_std == pytest.approx(math.sqrt(2 / 6))
    assert [*posterior.named_means()] == [SCORE]
    others = [("problem_type", "regression"), ("problem_type", "multi_label_classification"), ("num_labels", 1)]
    for name, value in others:
        base = Net()
        setattr(base.config, name, value)
        posterior = bayesianize(get_peft_model(base, LORA), over_head)
        assert posterior.head is None
        assert [*posterior.named_means()] == ["base_model.model.linear.lora_A"]


def test_the_bound_is_the_authors_packages():
    theirs = pytest.importorskip("vbll").DiscClassification(6, 3, 0.5, parameterization="diagonal")
    model, posterior = net()
    model.eval()
    states, labels = torch.randn(7, 6), torch.arange(7) % 3
    with torch.no_grad():
        theirs.W_mean.copy_(posterior.named_means()[SCORE])
        theirs.W_logdiag.fill_(math.log(0.3))
        theirs.noise_logdiag.fill_(-30.0)  # their logits' own noise, which ours have not
    logits, variance = posterior.head(states), posterior.head.variance(states)
    bound = CATEGORICAL.log_prob(logits, labels) - CATEGORICAL.noise_cost(logits, variance, labels)
    torch.testing.assert_close(bound.mean(), theirs.jensen_bound(states, labels).mean())


@pytest.mark.parametrize("likelihood", [CATEGORICAL, Categorical(weights=(1.0, 3.0, 0.5))])
def test_the_bound_lies_above_the_expected_nll_and_meets_it_without_noise(likelihood):
    generator = torch.Generator().manual_seed(0)
    logits, variance = torch.randn(5, 3, generator=generator) * 2, torch.rand(5, 3, generator=generator) * 4
    labels = torch.tensor([0, 1, 2, 0, 1])
    draws = logits + variance.sqrt() * torch.randn(40_000, 5, 3, generator=generator)
    costs = likelihood.log_prob(logits, labels) - likelihood.log_prob(draws, labels)
    error = costs.std(0) / math.sqrt(len(draws))
    assert (likelihood.noise_cost(logits, variance, labels) > costs.mean(0) - 5 * error).all()
    assert torch.equal(likelihood.noise_cost(logits, 0 * variance, labels), torch.zeros(5))


@pytest.mark.parametrize("kind", KINDS)
def test_the_variance_of_what_a_model_makes_of_its_outputs(kind, base):
    """A causal model reads the last token's, and that is where the variance must be taken."""
    model, posterior = tiny(kind, base, "none")
    expected = _read(model, posterior).square() @ posterior.named_stds()[SCORES[kind]].square().T
    posterior.head.train()  # the rest has no dropout in eval mode
    with posterior.bounding() as bounding:
        logits = model(**INPUTS).logits
        variance = bounding.variance_of(logits)
    torch.testing.assert_close(variance, expected)
    (slope,) = torch.autograd.grad(variance.sum(), posterior.named_std_parameters()[SCORES[kind]])
    assert (slope > 0).all()


def _read(model, posterior):
    """What the head reads of each input, (b, d)."""
    read = []
    handle = posterior.head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].detach()))
    model(**INPUTS)
    handle.remove()
    return read[0][[0, 1], [3, 2]] if read[0].ndim == 3 else read[0]


@pytest.mark.parametrize(("rate", "batch"), [(0.05, 20), (0.02, 40), pytest.param(0.05, 40, marks=pytest.mark.long)])
def test_training_reaches_the_optimum_of_the_bound_by_its_defaults(rate, batch, tmp_path):
    """The KL's scale of so few examples is D / 240."""
    task, method = Rows(), Blob(factors="none", head_prior_std=1.0)
    torch.manual_seed(1)
    model = method.prepare(Net(), LORA)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(False)
    options = dict(max_steps=1500, per_device_train_batch_size=batch, learning_rate=rate)
    method.fit(model, training(task, tmp_path, **options))
    posterior = find_posterior(model)

    def objective(flat):
        mean, log_std = (torch.from_numpy(part).reshape(3, 6) for part in (flat[:18], flat[18:]))
        mean.requires_grad_(), log_std.requires_grad_()
        x = task.x.double()
        logits, variance = x @ mean.T, x.square() @ (2 * log_std).exp().T
        terms = (logits + variance / 2).logsumexp(-1) - logits.gather(1, task.y[:, None])[:, 0]
        total = terms.sum() + len(x) / 240 * kl_divergence(Normal(mean, log_std.exp()), Normal(0.0, 1.0)).sum()
        total.backward()
        return total.item(), torch.cat([mean.grad.flatten(), log_std.grad.flatten()]).numpy()

    start = torch.zeros(36, dtype=torch.float64).numpy()
    best = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 2000})
    log_stds = posterior.named_stds()[SCORE].log()
    found = torch.cat([posterior.named_means()[SCORE].flatten(), log_stds.flatten()]).detach().double().numpy()
    assert objective(found)[0] == pytest.approx(best.fun, rel=1e-3)
    assert (log_stds.detach().double().numpy().ravel() - best.x[18:]) == pytest.approx(0, abs=0.1)


def test_a_loop_of_your_own_draws_the_head_for_each_example():
    model, posterior = net(std=0.5, factors="none")
    model.train()
    torch.manual_seed(0)
    x = torch.randn(1, 6).expand(20_000, 6)
    logits = model(x)
    variance = posterior.head.variance(model.base_model.model.linear(x[:1]))
    model.eval()
    expected = model(x[:1])
    error = (variance / len(x)).sqrt()
    assert ((logits.mean(0) - expected).abs() < 5 * error).all()
    torch.testing.assert_close(logits.var(0), variance[0], rtol=0.05, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_is_the_model_with_that_head(kind, base):
    model, posterior = tiny(kind, base)
    weights = posterior.sample(torch.Generator().manual_seed(3))
    with posterior.draw(3):
        found = model(**INPUTS).logits
        merged = copy.deepcopy(model).merge_and_unload()
    assert not any(isinstance(module, GaussianHead) for module in merged.modules())
    assert not any("blob" in name for name in merged.state_dict())
    torch.testing.assert_close(merged.eval()(**INPUTS).logits, found, rtol=1e-4, atol=1e-5)
    name = next(layer for layer in weights if posterior.named_layers()[layer] is posterior.head)
    with torch.no_grad(), posterior.fixed(posterior.without_head(weights)):
        posterior.head.weight.copy_(weights[name]["weight"])
        torch.testing.assert_close(model(**INPUTS).logits, found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factors", ["A", "none"])
def test_merge_adapter_has_no_place_for_a_draw_of_the_head(factors, base):
    model, _ = tiny("bert", base, factors)
    copied = copy.deepcopy(model)
    with find_posterior(copied).draw(3), pytest.raises(ValueError, match="draw of it is in force: call merge_and_un"):
        copied.merge_adapter()
    mean = model(**INPUTS).logits
    model.merge_adapter()
    torch.testing.assert_close(model(**INPUTS).logits, mean)
    model.unmerge_adapter()
    debayesianize(model)
    assert "merge_adapter" not in vars(model.base_model)


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_the_mean_over_the_heads_draws(kind, base):
    """By the mean-field formula: within 0.02 of the mean over 20,000 true draws of the weights, and the share too."""
    model, posterior = tiny(kind, base, "none")
    found = predict(model, INPUTS, 10, seed=1)
    assert len(found.log_probs) == 1
    states, head = _read(model, posterior), posterior.head
    weights = torch.stack([_sampled(posterior, seed) for seed in range(2000)])
    bias = 0 if head.bias is None else head.bias
    p = (torch.einsum("bi,sci->sbc", states, weights) + bias).softmax(-1).detach()
    torch.testing.assert_close(found.probabilities, p.mean(0), atol=0.03, rtol=0)
    entropy = torch.special.entr(p.mean(0)).sum(-1)
    information = entropy - torch.special.entr(p).sum(-1).mean(0)
    torch.testing.assert_close(found.head_shares[:, 0], information / entropy, atol=0.05, rtol=0)
    torch.testing.assert_close(found.std, p.std(0), atol=0.05, rtol=0)
    torch.testing.assert_close(found.mutual_information, found.head_shares[:, 0] * found.predictive_entropy)
    torch.testing.assert_close(found.expected_entropy + found.mutual_information, found.predictive_entropy)
    mean = predict(model, INPUTS, 0)
    assert mean.head_shares is None
    torch.testing.assert_close(mean.log_probs[0], model(**INPUTS).logits.log_softmax(-1).detach())


def _sampled(posterior, seed):
    (weights,) = posterior.sample(torch.Generator().manual_seed(seed)).values()
    return weights["weight"].detach()


def test_without_width_the_mean_over_a_head_is_its_mean():
    _, posterior = net(std=1e-9)
    states = torch.randn(7, 6)
    logits, share = average_head(posterior.head, posterior.head(states), states)
    torch.testing.assert_close(logits, posterior.head(states))
    assert share.abs().max() < 1e-5


def test_one_forward_for_any_number_where_the_head_alone_is_gaussian(base):
    model, posterior = tiny("llama", base, "none")
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    found = predict(model, INPUTS, 10, seed=2)
    assert len(calls) == 1
    torch.testing.assert_close(predict(model, INPUTS, 3, seed=5).log_probs, found.log_probs)
    averaged = average_draws(lambda: model(**INPUTS).logits, posterior, 10)
    torch.testing.assert_close(averaged, found.log_probs[0])


def test_each_draw_of_an_adapter_has_the_mean_over_the_head(base):
    model, posterior = tiny("llama", base)
    found = predict(model, INPUTS, 4, seed=2)
    assert len(found.log_probs) == 4
    generator = torch.Generator().manual_seed(2)
    for log_probs in found.log_probs:
        with posterior.fixed(posterior.without_head(posterior.sample(generator))):
            logits, _ = average_head(posterior.head, model(**INPUTS).logits, _read(model, posterior))
        torch.testing.assert_close(logits.log_softmax(-1), log_probs, rtol=1e-4, atol=1e-5)
    alone = predict(model, {name: tensor[:1] for name, tensor in INPUTS.items()}, 4, seed=2)
    torch.testing.assert_close(alone.log_probs, found.log_probs[:, :1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone.mutual_information, found.mutual_information[:1], rtol=1e-3, atol=1e-5)
    share = found.head_shares[:, 0]
    assert (found.mutual_information > share * found.expected_entropy / (1 - share)).all()
    stopped = predict(model, INPUTS, 12, stop=StoppingRule(tolerance=1e-9))
    assert len(stopped.log_probs) == 12
    assert (stopped.mutual_information > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_beside_a_stock_lora_and_loaded(kind, base, tmp_path):
    model, posterior = tiny(kind, base)
    expected = predict(model, INPUTS, 3, seed=5).log_probs
    bloblora.save(model, tmp_path)
    stock = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path)
    assert find_posterior(stock) is None
    torch.testing.assert_close(stock.eval()(**INPUTS).logits, model(**INPUTS).logits)
    loaded = bloblora.load(copy.deepcopy(model).unload(), tmp_path)
    torch.testing.assert_close(predict(loaded, INPUTS, 3, seed=5).log_probs, expected)
    assert find_posterior(loaded).config.head_prior_std == posterior.config.head_prior_std
    torch.testing.assert_close(find_posterior(loaded).kl(), posterior.kl())


def test_plain_again(base):
    model, _ = tiny("llama", base)
    logits = model(**INPUTS).logits
    debayesianize(model)
    assert type(model.base_model.model.score.modules_to_save["default"]) is nn.Linear
    assert not any("blob" in name for name in model.state_dict())
    torch.testing.assert_close(model(**INPUTS).logits, logits)


def test_a_run_of_labels_has_it(base, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", queries())
    given = dict(data=str(data), model=str(base), steps=30, learning_rate=0.02, validation=0)
    run = runs.train(runs.RunConfig.of(output=str(tmp_path / "run"), factors="none", **given), progress=False)
    stds = find_posterior(run.model).named_stds()[SCORE]
    assert stds.std() / stds.mean() > 0.01  # the data shape it
    found = run.predict(queries(), 10)
    assert (found.mutual_information > 0).all()
    loaded = runs.load_run(tmp_path / "run").predict(queries(), 10)
    torch.testing.assert_close(loaded.log_probs, found.log_probs)
    torch.testing.assert_close(loaded.mutual_information, found.mutual_information)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "head_prior_std",
            0.0,
            "head_prior_std must be a finite number above 0, got 0.0; the only words are",
        ),
        ("head_prior_std", "start", r"head_prior_std must be a finite number above 0, got 'start'"),
        ("head_kl_scale", -1.0, "head_kl_scale must be a finite number of at least 0, got -1.0"),
    ],
)
def test_an_option_out_of_its_range(option, value, message):
    with pytest.raises(ValueError, match=message):
        Blob(**{option: value})


def test_a_second_time_is_refused(base):
    model, _ = tiny("llama", base, "none")
    with pytest.raises(ValueError, match=r"base_model.model.score is Bayesian already; call find_posterior"):
        bayesianize(model)


def test_what_has_no_head_says_so(base):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="factors is 'none', and the head is no Gaussian either"):
        bayesianize(get_peft_model(load_model(str(base)), lora), BlobConfig(factors="none"))
    with pytest.raises(ValueError, match=r"head_prior_std is 0.1, and adapter 'default' trains no head"):
        bayesianize(get_peft_model(load_model(str(base)), lora), BlobConfig(head_prior_std=0.1))


def test_the_trainers_own_classification_loss_has_the_bound(base, tmp_path):
    """The snippet of the README: no task, transformers' own model and loss."""
    model, posterior = tiny("llama", base, "none")
    rows = [
        {"input_ids": row, "attention_mask": (row != 0).long(), "labels": torch.tensor(i)} for i, row in enumerate(IDS)
    ]
    arguments = BlobTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=0.0,
        report_to=[],
        use_cpu=True,
    )
    trainer = BlobTrainer(model, arguments, train_dataset=rows)
    model.train()
    batch = {**INPUTS, "labels": torch.tensor([0, 1])}
    torch.manual_seed(0)
    loss, _ = trainer.compute_loss(model, batch, True)
    torch.manual_seed(0)
    with posterior.bounding() as bounding:
        logits = model(**INPUTS).logits
        variance = bounding.variance_of(logits)
    expected = nn.functional.cross_entropy(logits + 0, batch["labels"])
    expected = expected + CATEGORICAL.noise_cost(logits, variance, batch["labels"]).mean()
    torch.testing.assert_close(loss, expected)
    assert (variance > 0.01).all()


def own_loss(model, folder, labels, **options):
    """The loss of transformers' own model, of the texts with these labels, and the trainer."""
    arguments = BlobTrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True, **options)
    rows = [{"input_ids": row, "attention_mask": (row != 0).long(), "labels": labels[0]} for row in IDS]
    trainer = BlobTrainer(model, arguments, train_dataset=rows)
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    model.train()
    return trainer.compute_loss(model, {**INPUTS, "labels": torch.stack([torch.as_tensor(label) for label in labels])})


def test_labels_as_transformers_own_loss_takes_them(base, tmp_path):
    """A label of -100 is left out, and (b, 1) is (b,)."""
    model, _ = tiny("llama", base, "none")
    both = own_loss(model, tmp_path, [0, 1])
    torch.testing.assert_close(own_loss(model, tmp_path, [[0], [1]]), both)
    first, second = own_loss(model, tmp_path, [0, -100]), own_loss(model, tmp_path, [-100, 1])
    torch.testing.assert_close((first + second) / 2, both)
    assert abs(first - second) > 0.01


def test_labels_that_are_no_classes(base, tmp_path):
    """transformers would make it a training of several labels at once, after the head has become Gaussian."""
    model, _ = tiny("llama", base, "none")
    with pytest.raises(ValueError, match=r"labels: torch.float32 of shape \(2, 3\) are no classes.*problem_type"):
        own_loss(model, tmp_path, [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    ("kind", "head"), [(BertForTokenClassification, "classifier"), (BertForQuestionAnswering, "qa_outputs")]
)
def test_an_adapter_that_does_not_say_what_it_is_for(kind, head):
    """The model's class does: a head that gives no text a label is a point."""
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    lora = LoraConfig(r=2, target_modules=["query"], modules_to_save=[head])
    posterior = bayesianize(
        get_peft_model(kind(BertConfig(num_labels=2, **sizes)), lora), BlobConfig(head_prior_std="auto")
    )
    assert posterior.head is None
    assert posterior.adapter_is_gaussian


def test_under_inference_mode_and_without_the_adapter(base):
    model, _ = tiny("llama", base, "none")
    expected = predict(model, INPUTS, 2)
    with torch.inference_mode():
        found = predict(model, INPUTS, 2)
        merged = average_draws(lambda: model(**INPUTS).logits, find_posterior(model), 2)
    torch.testing.assert_close(merged, found.log_probabilities)
    assert torch.equal(found.log_probs, expected.log_probs)
    assert torch.equal(found.mutual_information, expected.mutual_information)
    with model.disable_adapter():
        without = predict(model, INPUTS, 2)
        right = model(**INPUTS).logits.softmax(-1)
    torch.testing.assert_close(without.probabilities, right)
    assert (without.mutual_information == 0).all()


def test_a_compiled_training_has_the_bound(base, tmp_path):
    losses = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        model, posterior = tiny("llama", base, "none")
        rows = [{"input_ids": row[:3], "labels": torch.tensor(i)} for i, row in enumerate(IDS)]
        arguments = BlobTrainingArguments(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, **options
        )
        trainer = BlobTrainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses.append((trainer.state.log_history[-1]["train_loss"], posterior.named_stds()[SCORE]))
    torch.testing.assert_close(losses[1], losses[0])
