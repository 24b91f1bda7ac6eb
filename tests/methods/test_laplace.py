"""The Laplace posterior against laplace-torch's own, exact cases, and its closed-form predictive."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from laplace import KronLaplace
from peft import LoraConfig
from torch import nn
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader

from bloblora.adapter import AdapterFileError
from bloblora.methods import Training
from bloblora.methods.laplace import _EIGEN, LaplaceLora, fit_laplace, kronecker_factors
from bloblora.prediction import predict
from bloblora.tasks import Bernoulli, Categorical, ChoiceText, Classification, encode_all
from tests.prediction.conftest import TEXTS, tiny_classifier
from tests.tasks.conftest import questions, tiny_causal, tokenizer, with_lora

__all__ = ["questions", "tokenizer"]

LAST = LaplaceLora(subset_of_weights="last_layer")


@pytest.fixture
def classify(tokenizer):
    """A trained LoRA with a trained head, and texts of different lengths with three labels."""

    def build(*targets, task_type="SEQ_CLS", texts=TEXTS):
        model = with_lora(tiny_classifier(), *(targets or ("q_proj", "v_proj")), task_type=task_type)
        task = Classification(pad_token_id=0, labels=("a", "b", "c"))
        return model, training_on(
            task, [{"text": t, "label": x} for t, x in zip(texts, "abc", strict=False)], tokenizer
        )

    return build


@pytest.fixture
def ask(questions, tokenizer):
    """The same for questions."""
    return lambda: (
        with_lora(tiny_causal(), "q_proj", "v_proj"),
        training_on(ChoiceText(pad_token_id=0), questions, tokenizer),
    )


def training_on(task, records, tokenizer):
    return Training(task, encode_all(task, records, tokenizer), {"per_device_train_batch_size": 3, "seed": 0})


def lora(model):
    return LaplaceLora().layers(model)


class Logits(nn.Module):
    """A model as laplace-torch takes it."""

    def __init__(self, model, training):
        super().__init__()
        self.model, self.task = model, training.task

    def forward(self, batch):
        return self.task.logits(self.model, batch)


def jacobian(model, layers, training):
    """(b, C, P) by reverse mode."""
    batch = training.task.collate(training.examples)
    weights = {f"model.{name}.weight": layer.weight.detach() for name, layer in layers.items()}
    parts = jacrev(lambda changed: functional_call(Logits(model, training), changed, (batch,)))(weights)
    return torch.cat([part.flatten(2) for part in parts.values()], -1)


def logits_of(model, training):
    with torch.no_grad():
        return logits_with_graph(model, training)


def logits_with_graph(model, training):
    return training.task.logits(model, training.task.collate(training.examples))


def fisher(logits):
    p = logits.softmax(-1)
    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def posterior_covariance(sampler):
    blocks = []
    for name in sampler.layers:
        g_values, a_values, g_vectors, a_vectors = (sampler.eigen[f"{name}.{part}"] for part in _EIGEN)
        precision = torch.kron(g_vectors * g_values @ g_vectors.T, a_vectors * a_values @ a_vectors.T)
        blocks.append(torch.linalg.inv(precision + sampler.prior_precision * torch.eye(len(precision))))
    return torch.block_diag(*blocks)


def test_factors_and_evidence_are_those_of_laplace_torch(classify):
    # v_proj: the last token reads the values of all positions, so that all of them count. No padding: equal lengths.
    model, training = classify("v_proj", task_type=None)
    training.examples = [{**example, "input_ids": example["input_ids"][:2]} for example in training.examples]
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight.requires_grad}
    factors, _ = kronecker_factors(model, layers, training)
    theirs = KronLaplace(Logits(model, training), "classification", asdl_fisher_kwargs={"kfac_approx": "reduce"})
    theirs.fit(DataLoader(training.examples, batch_size=2, collate_fn=training.task.collate))
    for (g, a), (their_g, their_a) in zip(factors, theirs.H_facs.kfacs, strict=True):
        assert relative(torch.kron(g, a), torch.kron(their_g, their_a).double()) < 1e-5
    sampler = fit_laplace(model, layers, training)
    precision = torch.tensor(sampler.prior_precision)
    assert sampler.log_marginal_likelihood == pytest.approx(theirs.log_marginal_likelihood(precision).item(), rel=1e-4)
    given = fit_laplace(model, layers, training, 3.0)
    assert given.prior_precision == 3.0
    at_three = theirs.log_marginal_likelihood(torch.tensor(3.0)).item()
    assert given.log_marginal_likelihood == pytest.approx(at_three, rel=1e-4)
    assert at_three < sampler.log_marginal_likelihood
    theirs.prior_precision = precision
    torch.testing.assert_close(
        posterior_covariance(sampler), theirs.posterior_precision.to_matrix(exponent=-1), rtol=1e-3, atol=1e-4
    )


def test_the_heads_factors_are_exact_for_one_example(classify):
    model, training = classify(texts=TEXTS[:1])
    layers = LAST.layers(model)
    assert list(layers) == ["base_model.model.score.modules_to_save.default"]
    ((g, a),), log_likelihood = kronecker_factors(model, layers, training)
    logits = logits_of(model, training)
    j = jacobian(model, layers, training)[0]
    torch.testing.assert_close(torch.kron(g, a).float(), j.T @ fisher(logits)[0] @ j, rtol=1e-4, atol=1e-5)
    assert log_likelihood == pytest.approx(logits[0].log_softmax(-1)[0].item(), rel=1e-5)


@pytest.mark.parametrize("case", ["classify", "ask"])
def test_padding_does_not_count(case, request):
    model, training = request.getfixturevalue(case)()
    padded, log_likelihood = kronecker_factors(model, lora(model), training)
    training.arguments["per_device_train_batch_size"] = 1
    alone, expected = kronecker_factors(model, lora(model), training)
    assert log_likelihood == pytest.approx(expected, rel=1e-5)
    for pair, other in zip(padded, alone, strict=True):
        assert relative(torch.kron(*pair), torch.kron(*other)) < 1e-5


def test_labels_drawn_from_the_model_give_the_fisher():
    logits, number = torch.randn(12), 20_000
    drawn = Categorical().fisher_root(logits.expand(number, -1), torch.Generator().manual_seed(1))
    assert drawn.shape == (8, number, 12)
    products = torch.einsum("kbc,kbd->bcd", drawn, drawn)
    error = products.std(0) / number**0.5
    assert ((products.mean(0) - fisher(logits)).abs() < 4.5 * error).all()


def test_draws_have_the_closed_forms_covariance(classify):
    model, training = classify()
    layers = lora(model)
    sampler = fit_laplace(model, layers, training)
    j = jacobian(model, layers, training).flatten(0, 1)
    expected = j @ posterior_covariance(sampler) @ j.T  # between all logits of all examples
    mean = logits_of(model, training).flatten()
    number = 4000
    generator = torch.Generator().manual_seed(1)
    changes = torch.stack([torch.cat([p.flatten() for p in sampler.draw(generator)]) for _ in range(number)])
    drawn = changes @ j.T
    error = ((expected.diag().outer(expected.diag()) + expected.square()) / number).sqrt()
    assert ((drawn.T @ drawn / number - expected).abs() < 4.5 * error).all()
    for forward in (logits_of, logits_with_graph):  # a forward-mode differentiation a draw, a backward a class
        found = sampler.logits(partial(forward, model, training), 3, 1)
        for logits, change in zip(found, drawn, strict=False):
            torch.testing.assert_close(logits.flatten(), mean + change, rtol=1e-3, atol=1e-3)
        (at_zero,) = sampler.logits(partial(forward, model, training), 0, 1)
        torch.testing.assert_close(at_zero.flatten(), mean)


def test_a_width_is_how_far_draws_are_from_the_mean(classify):
    model, training = classify()
    sampler = fit_laplace(model, lora(model), training)
    forward = partial(logits_of, model, training)
    (mean,) = sampler.logits(forward, 0, 0)
    before = [logits - mean for logits in sampler.logits(forward, 3, 0)]
    assert sampler.scalable is sampler
    sampler.scale_(0.25)
    after = [logits - mean for logits in sampler.logits(forward, 3, 0)]
    torch.testing.assert_close(after, [moved / 4 for moved in before], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["classify", "ask"])
def test_both_ways_to_draw_agree(case, request, monkeypatch):
    model, training = request.getfixturevalue(case)()
    sampler = fit_laplace(model, lora(model), training)
    options = dict(num_samples=4, task=training.task, sampler=sampler)
    by_slopes = predict(model, training.examples, **options).log_probs
    monkeypatch.setattr("bloblora.methods.laplace._CLASSES_A_DRAW", 0)
    torch.testing.assert_close(by_slopes, predict(model, training.examples, **options).log_probs, rtol=1e-3, atol=1e-3)


def test_the_prior_precision_has_the_largest_evidence(classify):
    model, training = classify()
    layers = lora(model)
    sampler = fit_laplace(model, layers, training)
    squared_norm = sum(layer.weight.double().square().sum() for layer in layers.values())
    eigenvalues = torch.cat(
        [sampler.eigen[f"{name}.G_values"].outer(sampler.eigen[f"{name}.A_values"]).flatten() for name in layers]
    ).double()
    _, log_likelihood = kronecker_factors(model, layers, training)

    def evidence(log_precision):
        d = log_precision.exp()
        return log_likelihood - (((eigenvalues + d) / d).log().sum() + d * squared_norm).item() / 2

    grid = torch.linspace(-10, 10, 2001, dtype=torch.float64)
    values = torch.tensor([evidence(point) for point in grid])
    assert values.argmax() not in (0, 2000)
    assert grid[values.argmax()].item() == pytest.approx(torch.tensor(sampler.prior_precision).log().item(), abs=0.011)
    assert sampler.log_marginal_likelihood == pytest.approx(values.max().item(), abs=1e-3)


@pytest.mark.parametrize("case", ["classify", "ask"])
def test_held_out_examples_choose_the_precision(case, request):
    model, training = request.getfixturevalue(case)()
    training.holdout = training.examples[::-1]
    sampler = fit_laplace(model, lora(model), training, held_out=True)
    labels = torch.tensor([example["label"] for example in training.holdout])

    def nll(precision):
        candidate = replace(sampler, prior_precision=precision)
        answer = predict(model, training.holdout, 10, task=training.task, sampler=candidate)
        return torch.nn.functional.nll_loss(answer.log_probabilities, labels).item()

    grid = [nll(math.exp(point)) for point in range(-10, 11)]
    assert nll(sampler.prior_precision) < min(grid) + 0.02 * (max(grid) - min(grid))
    evidence = fit_laplace(model, lora(model), training, sampler.prior_precision).log_marginal_likelihood
    assert sampler.log_marginal_likelihood == pytest.approx(evidence)


def test_the_fisher_of_labels_is_that_of_two_classes_each():
    """The label's log-odds are those of the classes (no, yes), of which the second logit alone moves."""
    logits = torch.tensor([[0.3, -2.0], [1.5, 0.0]])
    found = torch.einsum("kbi,kbj->bij", *[Bernoulli().fisher_root(logits, torch.Generator())] * 2)
    for label in range(2):
        classes = torch.stack([torch.zeros(2), logits[:, label]], -1)
        torch.testing.assert_close(found[:, label, label], fisher(classes)[:, 1, 1])
    assert not found[:, 0, 1].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"holdout": 1.0}, r"holdout must be in \[0, 1\), got 1.0"),
        ({"holdout": 0.2, "prior_precision": 1.0}, "holdout is for choosing prior_precision"),
        ({"prior_precision": 0.0}, "prior_precision must be a finite number above 0, got 0.0"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        LaplaceLora(**options)


@pytest.mark.parametrize("method", [LaplaceLora(), LAST])
def test_a_draw_is_one_function(method, classify):
    model, training = classify()
    sampler = fit_laplace(model, method.layers(model), training)
    unlabelled = [{"input_ids": example["input_ids"], "truncated": 0} for example in training.examples]
    together = predict(model, unlabelled, 3, seed=5, task=training.task, sampler=sampler).log_probs
    for i, example in enumerate(unlabelled):
        alone = predict(model, [example], 2, seed=5, task=training.task, sampler=sampler).log_probs
        torch.testing.assert_close(alone[:, 0], together[:2, i], rtol=1e-4, atol=1e-4)
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize(("target", "module"), [("v_proj", ".layers.1.self_attn.v_proj"), ("lm_head", ".lm_head")])
def test_the_last_layer_without_a_head_is_the_last_lora(target, module):
    layers = LAST.layers(with_lora(tiny_causal(), "q_proj", target))
    assert any(f"{module}.lora_B" in name for name in layers)
    assert not any(".layers.0." in name for name in layers)


def test_a_layer_too_wide_is_named(monkeypatch):
    monkeypatch.setattr("bloblora.methods.laplace._LONGEST_SIDE", 40)
    with pytest.raises(
        ValueError, match=r"up_proj.lora_B.default is \(64, 2\); 'laplace-lora' takes at most 40 a side"
    ):
        LaplaceLora().prepare(tiny_causal(), LoraConfig(r=2, target_modules=["up_proj"]))


@pytest.mark.parametrize("method", [LaplaceLora(), LAST])
def test_it_loads_with_the_same_bits_and_without_pickle(method, classify, tmp_path):
    model, training = classify()
    sampler = fit_laplace(model, method.layers(model), training)
    sampler.scale_(0.5)
    method.save(model, sampler, tmp_path)
    loaded, other = method.load(tiny_classifier(), tmp_path)
    before, after = (
        predict(m, training.examples, 3, task=training.task, sampler=s) for m, s in ((model, sampler), (loaded, other))
    )
    assert torch.equal(after.log_probs, before.log_probs)
    assert {file.suffix for file in tmp_path.rglob("*")} == {".json", ".safetensors", ".md"}
    (tmp_path / "laplace.safetensors").write_bytes(b"")
    with pytest.raises(AdapterFileError, match=r"laplace.safetensors: its SHA-256"):
        method.load(tiny_classifier(), tmp_path)
