"""The hidden state that a head reads, against transformers' own hidden states."""

import pytest
import torch
from torch import nn

from bloblora import runs, tasks
from bloblora.adapter import find_posterior
from bloblora.prediction import Distance, StoppingRule, hidden_states, predict
from tests.tiny_base import QUESTIONS, queries, write_jsonl


@pytest.fixture(scope="module")
def run_of(base, tmp_path_factory):
    found = {}

    def build(kind, method="blob", **options):
        key = (kind, method)
        if key not in found:
            folder = tmp_path_factory.mktemp("hidden")
            records = queries() if kind == "texts" else QUESTIONS
            config = runs.RunConfig.of(
                data=str(write_jsonl(folder / "data.jsonl", records)),
                output=str(folder / "run"),
                model=str(base),
                method=method,
                steps=4,
                batch_size=2,
                learning_rate=0.05,
                **options,
            )
            runs.train(config, progress=False)
            found[key] = runs.load_run(config.output)
        return found[key]

    return build


def test_of_a_text_it_is_its_last_tokens(run_of):
    run = run_of("texts")
    examples = tasks.encode_all(run.task, queries(), run.tokenizer)
    found = hidden_states(run.model, examples, task=run.task, batch_size=3)
    for example, state in zip(examples, found, strict=True):
        ids = torch.tensor([example["input_ids"]])
        with torch.no_grad(), find_posterior(run.model).mean():
            expected = run.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)
    # the head makes the mean's prediction of it
    head = next(module for name, module in run.model.named_modules() if name.endswith("score"))
    with torch.no_grad():
        logits = nn.Module.__call__(head, found)
    expected = predict(run.model, examples, 0, task=run.task).log_probabilities
    torch.testing.assert_close(logits.log_softmax(-1), expected, rtol=1e-4, atol=1e-5)


def test_of_a_question_it_is_the_mean_over_what_predicts_the_choices(run_of):
    run = run_of("questions")
    examples = tasks.encode_all(run.task, QUESTIONS, run.tokenizer)
    found = hidden_states(run.model, examples, task=run.task)
    for example, state in zip(examples, found, strict=True):
        rows = []
        for number, branch in enumerate(example["branches"]):
            ids = torch.tensor([example["prefix"] + branch])
            with torch.no_grad(), find_posterior(run.model).mean():
                hidden = run.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
            # the prefix's last token predicts the first of every choice, and is one position
            rows.append(hidden[len(example["prefix"]) - (number == 0) : -1])
        torch.testing.assert_close(state, torch.cat(rows).mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "ensemble", "laplace-lora", "full", "c-lora"])
def test_any_method_has_them(method, run_of):
    run = run_of("texts", method, **({"members": 2} if method == "ensemble" else {}))
    needed = {name: p.requires_grad for name, p in run.model.named_parameters()}
    found = run.hidden_states(queries())
    assert found.shape == (4, run.model.config.hidden_size)
    assert torch.equal(found, run.hidden_states(queries()))
    assert torch.is_grad_enabled()
    assert needed == {name: p.requires_grad for name, p in run.model.named_parameters()}
    assert all(p.grad is None for p in run.model.parameters())


def test_a_model_without_a_head_is_named(run_of):
    run = run_of("texts")
    with pytest.raises(ValueError, match="Sequential has no output head called lm_head, score, classifier"):
        hidden_states(nn.Sequential(nn.Linear(2, 2)), [{"input_ids": [1]}], task=run.task)


@pytest.mark.parametrize(("method", "forwards"), [("lora", 1), ("blob", 5)])
@pytest.mark.parametrize("num_samples", [0, 4])
def test_a_prediction_has_distances_and_else_is_the_same(run_of, method, forwards, num_samples):
    """In the order of the inputs; where there is one function, it is the same forward."""
    run = run_of("texts", method, head="class_means")
    examples = tasks.encode_all(run.task, [{"text": record["text"]} for record in queries()], run.tokenizer)
    how = {"task": run.task, "sampler": run.sampler, "batch_size": 4}
    distance = Distance.fit(hidden_states(run.model, examples, **how), torch.arange(len(examples)) % 2)
    without = predict(run.model, examples, num_samples, 3, **how)
    calls, rows = [], lambda _, args: calls.append(len(args[0]))
    handle = run.model.get_input_embeddings().register_forward_pre_hook(rows)
    found = predict(run.model, examples, num_samples, 3, distance=distance, **how)
    handle.remove()
    expected = distance.scores(hidden_states(run.model, examples, **how))
    assert found.distances.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found.distances[name], values)
    torch.testing.assert_close(found.log_probs, without.log_probs)
    assert sum(calls) == len(examples) * (forwards if num_samples else 1)
    assert (without.distances, without.usual_score, found.usual_score) == (None, "predictive_entropy", "mahalanobis")


def test_distances_of_inputs_whose_draws_stop(run_of):
    run = run_of("texts", "blob", head="class_means")
    examples = tasks.encode_all(run.task, [{"text": record["text"]} for record in queries()], run.tokenizer)
    how = {"task": run.task, "sampler": run.sampler}
    states = hidden_states(run.model, examples, **how)
    distance = Distance.fit(states)
    found = predict(run.model, examples, 8, stop=StoppingRule(0.4, 0.4), distance=distance, **how)
    assert found.num_draws.min() < 8
    torch.testing.assert_close(found.distances["mahalanobis"], distance.scores(states)["mahalanobis"])
