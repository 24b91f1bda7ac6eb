"""`predict`: one draw is one function, whatever the batch; and what it leaves alone."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaForTokenClassification

from bloblora import BlobConfig, bayesianize, find_posterior, predict
from bloblora.posterior import ESTIMATORS
from bloblora.prediction import average_draws
from bloblora.tasks import ChoiceLetter, encode_all
from tests.conftest import tiny_llama
from tests.tasks.conftest import tiny_causal, train_tokenizer, with_lora

from .conftest import TASKS, tiny_classifier


def run(case, num_samples=3, examples=None, **options):
    return predict(case.model, examples or case.examples, num_samples, seed=4, task=case.task, **options)


def assert_rows(found, expected, rows):
    """Rows of a prediction; columns that only other questions have are 0."""
    wanted = expected.draw_probabilities[:, rows]
    width = found.draw_probabilities.shape[-1]
    assert (wanted[..., width:] == 0).all()
    torch.testing.assert_close(found.draw_probabilities, wanted[..., :width], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "estimator"),
    [*itertools.product(TASKS, ["independent"]), *itertools.product(["choice_letter"], ESTIMATORS[1:])],
)
def test_one_draw_is_one_function(name, estimator, case_of):
    case = case_of(name, estimator)
    together = run(case)
    assert (together.draw_probabilities[0] - together.draw_probabilities[1]).abs().max() > 0.01
    size = len(case.examples)
    for batch_size in (1, 2):
        assert_rows(run(case, batch_size=batch_size), together, range(size))
    for row in range(size):
        assert_rows(run(case, examples=case.examples[row : row + 1]), together, [row])
    for order in itertools.permutations(range(size)):
        assert_rows(run(case, examples=[case.examples[i] for i in order], batch_size=2), together, list(order))


@pytest.mark.parametrize("name", TASKS)
def test_draws_are_those_of_the_posterior(name, case_of):
    """Draw s has the weights that the s-th call of the same generator gives."""
    case = case_of(name)
    posterior, generator = find_posterior(case.model), torch.Generator().manual_seed(4)
    batch = case.task.collate(case.examples)
    found = run(case, num_samples=2)
    for draw in found.draw_probabilities:
        with torch.no_grad(), posterior.draw(generator):
            torch.testing.assert_close(draw, case.task.logits(case.model, batch).softmax(-1), rtol=0, atol=1e-5)


def test_zero_samples_is_the_mean(case_of):
    case = case_of("choice_text")
    found = run(case, num_samples=0)
    with torch.no_grad(), find_posterior(case.model).mean():
        expected = case.task.logits(case.model, case.task.collate(case.examples)).softmax(-1)
    assert found.draw_probabilities.shape[0] == 1
    torch.testing.assert_close(found.probabilities, expected, rtol=0, atol=1e-5)
    assert found.mutual_information.max() == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_inputs_of_a_tokenizer_under_any_padding(side, tokenizer):
    model = with_lora(tiny_classifier(), "q_proj", "v_proj")
    bayesianize(model, BlobConfig(init_std=0.16))
    tokenizer.padding_side = side
    texts = ["What?", "My card was charged twice, please refund it.", "Which gas?"]
    found = predict(model, tokenizer(texts, padding=True, return_tensors="pt"), 3)
    for row, text in enumerate(texts):
        assert_rows(predict(model, tokenizer([text], return_tensors="pt"), 3), found, [row])


def test_same_seed_and_fewer_draws(case_of):
    case = case_of("choice_letter")
    five = run(case, num_samples=5)
    assert torch.equal(run(case, num_samples=5).log_probs, five.log_probs)
    assert torch.equal(run(case, num_samples=2).log_probs, five.log_probs[:2])
    other = predict(case.model, case.examples, 5, seed=5, task=case.task)
    assert (other.draw_probabilities - five.draw_probabilities).abs().max() > 0.01


def test_what_stays_as_it_was(case_of):
    case = case_of("choice_letter")
    case.model.train()
    frozen = case.model.base_model.model.model.norm
    frozen.eval()
    modes, state = {n: m.training for n, m in case.model.named_modules()}, torch.get_rng_state()
    run(case)
    assert {n: m.training for n, m in case.model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(KeyError):
        predict(case.model, [{"input_ids": [1]}], task=case.task)
    assert {n: m.training for n, m in case.model.named_modules()} == modes


def test_train_mode_predicts_as_eval_mode(case_of):
    case = case_of("choice_letter")
    expected = run(case)
    case.model.train()
    assert torch.equal(run(case).log_probs, expected.log_probs)


def test_questions_with_fewer_choices(case_of, questions):
    case = case_of("choice_text")
    found = run(case, batch_size=1)
    for row, question in enumerate(questions):
        here = found.log_probs[:, row, : len(question["choices"])]
        assert here.isfinite().all()
        torch.testing.assert_close(here.exp().sum(-1), torch.ones(3))
        assert (found.draw_probabilities[:, row, len(question["choices"]) :] == 0).all()
    for entropy in (found.predictive_entropy, found.expected_entropy, found.mutual_information):
        assert entropy.isfinite().all()


def test_plain_model_has_one_draw(tokenizer, questions):
    model = with_lora(tiny_causal(), "q_proj")
    task = ChoiceLetter(pad_token_id=0)
    examples = encode_all(task, questions, tokenizer)
    found = predict(model, examples, 10, task=task)
    assert found.log_probs.shape == (1, 3, 4)
    with torch.no_grad():
        torch.testing.assert_close(found.probabilities, task.logits(model, task.collate(examples)).softmax(-1))


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tuple(tensor.shape))
        return result


@pytest.mark.parametrize("targets", [("q_proj",), ("q_proj", "lm_head")])
@pytest.mark.parametrize("num_samples", [0, 2])
def test_only_the_letters_logits_are_computed(targets, num_samples, tokenizer, questions, threads):
    threads(1)  # the recorder sees its own thread
    vocabulary = 400
    model = with_lora(tiny_causal(), *targets)
    bayesianize(model, BlobConfig(init_std=0.16))
    task = ChoiceLetter(pad_token_id=0)
    examples = encode_all(task, questions, tokenizer)
    with Shapes() as shapes:
        predict(model, examples, num_samples, task=task)
    of_vocabulary = {shape for shape in shapes.seen if vocabulary in shape}
    assert of_vocabulary <= {(vocabulary, 4), (vocabulary, 32)}  # views of weights: no (b, V), no (b, T, V)
    assert (3, 1, 4) in shapes.seen  # the letters of 3 questions at 1 position
    with Shapes() as whole, torch.no_grad():  # the check sees what it is to see
        model(task.collate(examples)["input_ids"])
    assert any(shape[-1:] == (vocabulary,) and len(shape) == 3 for shape in whole.seen)


class OneLayer(nn.Module):
    """Logits W x: a model whose distribution under the posterior is known."""

    def __init__(self, classes):
        super().__init__()
        self.head = nn.Linear(6, classes, bias=False)

    def forward(self, x):
        return SimpleNamespace(logits=self.head(x))


def one_layer(classes):
    """The posterior, three inputs, and mean (n, C) and covariance (n, C, C) of the logits in closed form."""
    model = get_peft_model(
        OneLayer(classes), LoraConfig(r=3, lora_alpha=6, target_modules=["head"], init_lora_weights=False)
    )
    posterior = bayesianize(model, BlobConfig(init_std=0.81))
    layer = model.base_model.model.head
    with torch.no_grad():
        base, b = layer.base_layer.weight.double(), layer.lora_B["default"].weight.double()
        m = layer.lora_A["default"].weight.double()
        variance = next(iter(posterior.named_std_parameters().values())).double().mul(2).exp()  # Ω², Ω = exp ρ
        x = torch.randn(3, 6)
        mean = x.double() @ (base + 2 * b @ m).T  # s = α/r = 2
        # Cov[B A x] = B diag(Ω² x²) Bᵀ
        covariance = 4 * torch.einsum("ck,nk,dk->ncd", b, x.double().square() @ variance.T, b)
    return model, x, mean.numpy(), covariance.numpy()


def test_logits_have_the_mean_and_covariance_of_the_closed_form():
    """Differences of log-probabilities are differences of logits."""
    size = 4000
    model, x, mean, covariance = one_layer(3)
    found = predict(model, {"x": x}, size).log_probs.double().numpy()
    differences = found[..., 1:] - found[..., :1]
    contrast = np.array([[-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0]])
    expected_covariance = contrast @ covariance @ contrast.T
    standard_error = np.sqrt(np.diagonal(expected_covariance, axis1=1, axis2=2) / size)
    assert (np.abs(differences.mean(0) - mean @ contrast.T) < 4 * standard_error).all()
    for row, wanted in enumerate(expected_covariance):
        sample = np.cov(differences[:, row].T)
        # Var of a Gaussian's sample covariance: (σ_ij² + σ_ii σ_jj) / S
        error = np.sqrt((wanted**2 + np.outer(np.diag(wanted), np.diag(wanted))) / size)
        assert (np.abs(sample - wanted) < 4 * error).all()


def test_probabilities_approach_their_integral():
    size = 4000
    model, x, mean, covariance = one_layer(2)
    found = predict(model, {"x": x}, size).draw_probabilities[..., 1].double().numpy()
    of_the_mean = []
    for row in range(3):
        difference = mean[row, 1] - mean[row, 0]
        std = math.sqrt(covariance[row, 0, 0] + covariance[row, 1, 1] - 2 * covariance[row, 0, 1])
        density = scipy.stats.norm(difference, std).pdf
        expected, _ = scipy.integrate.quad(
            lambda d, density=density: scipy.special.expit(d) * density(d), difference - 9 * std, difference + 9 * std
        )
        tolerance = 4 * found[:, row].std() / math.sqrt(size)
        assert abs(found[:, row].mean() - expected) < tolerance
        of_the_mean.append(abs(scipy.special.expit(difference) - expected) < tolerance)
    assert not all(of_the_mean)  # averaging matters here


def test_average_draws_is_the_prediction_of_a_batch(case_of):
    case = case_of("choice_letter")
    batch = case.task.collate(case.examples)
    with torch.no_grad():
        found = average_draws(lambda: case.task.logits(case.model, batch), find_posterior(case.model), 3, 4)
    torch.testing.assert_close(found.exp(), run(case).probabilities, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("logits", "expected"), [([[0.0, -200.0]], -200.0), ([[0.0, -1000.0]], -1000.0), ([[1.0, -math.inf]], -math.inf)]
)
def test_average_draws_keeps_tiny_probabilities(logits, expected):
    assert average_draws(lambda: torch.tensor(logits), None)[0, 1].item() == expected


def test_clear_errors(case_of):
    case = case_of("choice_letter")
    options = dict(task=case.task)
    for inputs, arguments, message in [
        (
            case.examples,
            dict(num_samples=-1, **options),
            r"num_samples must be 0 \(the mean\) or more, a whole number, got -1",
        ),
        (case.examples, dict(batch_size=0, **options), "batch_size must be 1 or more, got 0"),
        ([], options, "inputs: there is nothing to predict"),
        ({}, {}, "inputs: there is nothing to predict"),
        ({"input_ids": torch.zeros(0, 3)}, {}, "inputs: there is nothing to predict"),
        (
            case.examples,
            {},
            "without a task, pass texts with tokenizer=…, what .* got list",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            predict(case.model, inputs, **arguments)
    with pytest.raises(ValueError, match=r"num_samples must be 0 \(the mean\) or more, a whole number, got -1"):
        average_draws(lambda: torch.zeros(1, 2), None, -1)


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        (LlamaForCausalLM, {}, r"its logits must be \(n, C\).* they are \(\d+, \d, 400\); for answers in text use"),
        (LlamaForTokenClassification, {}, r"its logits must be \(n, C\)"),
        (
            LlamaForSequenceClassification,
            {"num_labels": 1},
            r"it has one label \(num_labels=1\), whose softmax is always 1",
        ),
        (
            LlamaForSequenceClassification,
            {"problem_type": "multi_label_classification"},
            "'multi_label.*', for which a softmax",
        ),
    ],
)
def test_models_whose_logits_are_not_those_of_classes(base, options, message):
    config = tiny_llama(vocab_size=400).config.to_dict()
    model = with_lora(base(LlamaConfig(**config | options)), "q_proj")
    texts = dict(inputs=["a card", "which gas"], tokenizer=train_tokenizer())
    for arguments in (dict(inputs={"input_ids": torch.tensor([[5, 6], [7, 8]])}), texts):
        with pytest.raises(ValueError, match=message):
            predict(model, **arguments)


def bayesian_classifier():
    model = with_lora(tiny_classifier(), "q_proj", "v_proj", task_type="SEQ_CLS")
    bayesianize(model, BlobConfig(init_std=0.16))
    return model.eval()


def test_a_compiled_or_wrapped_model_has_its_draws():
    model, inputs = bayesian_classifier(), {"input_ids": torch.tensor([[5, 6, 7]])}
    expected = predict(model, inputs, 3)
    assert (expected.std > 1e-4).all()
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        assert torch.equal(predict(wrapped, inputs, 3).log_probs, expected.log_probs)


def test_draws_of_a_merged_adapter_are_refused():
    model, inputs = bayesian_classifier(), {"input_ids": torch.tensor([[5, 6, 7]])}
    mean = predict(model, inputs, 0).probabilities
    model.merge_adapter()
    torch.testing.assert_close(predict(model, inputs, 0).probabilities, mean)
    with pytest.raises(ValueError, match=r"adapter 'default' is merged into .*call model.unmerge_adapter"):
        predict(model, inputs, 2)


def test_pairs_of_texts_are_read_whole():
    tokenizer, model = train_tokenizer(), bayesian_classifier()
    pair = {"text": "My card was charged", "text_pair": "the trophy"}
    found = predict(model, [pair], 2, tokenizer=tokenizer)
    right = predict(model, tokenizer([pair["text"]], [pair["text_pair"]], return_tensors="pt"), 2)
    torch.testing.assert_close(found.log_probs, right.log_probs)
    assert (found.log_probs != predict(model, [pair["text"]], 2, tokenizer=tokenizer).log_probs).any()
