"""Runs in the lm-evaluation-harness: against its own model class, and draws averaged by hand."""

import math

import pytest
import torch
import yaml

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from bloblora import find_posterior, posterior_generate, runs
from bloblora.integrations.lm_eval import BlobLM
from tests.tiny_base import QUESTIONS, queries, write_jsonl

SETTINGS = dict(steps=4, batch_size=2, r=2, learning_rate=0.01)
PROMPT = "Question: {}\nAnswer:"
PAIRS = [
    {**question, "choices": choices} for question in QUESTIONS for choices in (["a", "i"], ["in", "on"], ["gas", "sun"])
]


@pytest.fixture(scope="module")
def train(base, tmp_path_factory):
    def train(records, **options):
        folder = tmp_path_factory.mktemp("run")
        data = str(write_jsonl(folder / "data.jsonl", records))
        config = runs.RunConfig.of(data=data, output=str(folder / "run"), model=str(base), **{**SETTINGS, **options})
        runs.train(config, progress=False)
        return config.output

    return train


@pytest.fixture(scope="module")
def run(train):
    return train(QUESTIONS, init_std=0.49)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Multiple-choice tasks, each a YAML and a JSONL file."""
    folder = tmp_path_factory.mktemp("tasks")
    kinds = (("tiny", QUESTIONS, "acc", "mean"), ("pairs", PAIRS, "brier_score", "brier_score"))
    for name, records, metric, how in kinds:
        data = write_jsonl(folder / f"{name}.jsonl", records)
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": PROMPT.format("{{question}}"),
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": metric, "aggregation": how, "higher_is_better": metric == "acc"}],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(model, tasks, **options):
    """Accuracy, and each choice's log-likelihood and whether it is greedy."""
    found = simple_evaluate(model=model, tasks=["tiny"], task_manager=tasks, bootstrap_iters=0, **options)
    samples = sorted(found["samples"]["tiny"], key=lambda sample: sample["doc_id"])
    answers = [answer for sample in samples for answer in sample["filtered_resps"]]
    return found["results"]["tiny"]["acc,none"], answers


def test_the_mean_is_the_harness_own_model_with_peft(run, base, tasks):
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run)
    stock = HFLM(pretrained=adapted, tokenizer=AutoTokenizer.from_pretrained(base), batch_size=2)
    accuracy, answers = evaluate(stock, tasks)
    options = {"model_args": f"run={run},samples=0", "batch_size": 2, "device": "cuda:0"}  # as of the command line
    found_accuracy, found = evaluate("bloblora", tasks, **options)
    assert found_accuracy == accuracy
    assert len(found) == 5  # three choices and two
    assert [ll for ll, _ in found] == pytest.approx([ll for ll, _ in answers], abs=1e-6)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in answers]

    texts = instances("loglikelihood_rolling", [("plants take light " * 60,), ("a card",)])  # more than a window
    model = BlobLM(run, samples=0, max_length=32)
    stock = HFLM(pretrained=adapted, tokenizer=model.tokenizer, max_length=32)
    assert model.loglikelihood_rolling(texts) == pytest.approx(stock.loglikelihood_rolling(texts), abs=1e-4)
    prompts = instances("generate_until", [("Which gas", {"until": ["\n"], "max_gen_toks": 6})])
    assert model.generate_until(prompts) == stock.generate_until(prompts)


def test_draws_are_averaged_as_probabilities_of_whole_continuations(run, tasks):
    accuracy, found = evaluate("bloblora", tasks, model_args=f"run={run},samples=3,seed=7", batch_size=4)
    loaded, expected = runs.load_run(run), []
    pairs = [(PROMPT.format(q["question"]), " " + choice) for q in QUESTIONS for choice in q["choices"]]
    for prompt, choice in pairs:
        draws = [log_likelihood(loaded, prompt, choice, seed=7, number=number) for number in range(3)]
        expected.append(math.log(sum(map(math.exp, draws)) / 3))
        assert max(draws) - min(draws) > 0.01
    assert [ll for ll, _ in found] == pytest.approx(expected, abs=1e-4)
    best = [max(range(3), key=expected[:3].__getitem__), max(range(2), key=expected[3:].__getitem__)]
    assert accuracy == sum(answer == q["answer"] for answer, q in zip(best, QUESTIONS, strict=True)) / 2

    again = evaluate("bloblora", tasks, model_args=f"run={run},samples=3,seed=7", batch_size=1)
    assert [ll for ll, _ in again[1]] == pytest.approx([ll for ll, _ in found], abs=1e-5)
    other = evaluate("bloblora", tasks, model_args=f"run={run},samples=3,seed=8", batch_size=4)
    assert [ll for ll, _ in other[1]] != pytest.approx([ll for ll, _ in found], abs=1e-3)


@torch.no_grad()
def log_likelihood(loaded, prompt, choice, seed, number):
    """Of one draw, token by token."""
    posterior, generator = find_posterior(loaded.model), torch.Generator().manual_seed(seed)
    for _ in range(number):
        posterior.sample(generator)  # those before it
    start = len(loaded.tokenizer(prompt)["input_ids"])
    ids = loaded.tokenizer(prompt + choice, return_tensors="pt")["input_ids"]
    with posterior.draw(generator):
        log_probs = loaded.model(ids).logits.double().log_softmax(-1)[0]
    return sum(log_probs[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1]))


def test_a_long_text_sees_one_draw_in_all_its_windows(run):
    text = "plants take light " * 40
    model = BlobLM(run, samples=3, seed=1, max_length=16)
    (found,) = model.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
    posterior, totals = find_posterior(model.model), []
    generator = torch.Generator().manual_seed(1)
    stock = HFLM(pretrained=model.model, tokenizer=model.tokenizer, max_length=16)
    for _ in range(3):
        with posterior.draw(generator):
            totals += stock.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
    assert found == pytest.approx(torch.tensor(totals).double().logsumexp(0).item() - math.log(3), abs=1e-3)


def test_generation_is_the_posterior_s(train):
    folder = train([{"prompt": "Which gas?", "response": "carbon dioxide"}] * 4, init_std=0.25)
    model = BlobLM(folder, samples=2, batch_size=2)
    prompts = [
        ("Which gas?", {"until": ["zzz"], "max_gen_toks": 5}),
        ("What is", {"until": ["zzz"], "max_gen_toks": 5}),
    ]
    found = model.generate_until(instances("generate_until", prompts))
    for (prompt, _), text in zip(prompts, found, strict=True):
        batch = model.tokenizer(prompt, return_tensors="pt")
        tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
        options = {"tokenizer": model.tokenizer, "decoding": "average", "max_new_tokens": 5}
        answer = posterior_generate(model.model, tokens, 2, **options)
        assert text == answer.texts[0]


def test_answers_are_cached_whole(run, tasks, tmp_path):
    options = {"model_args": f"run={run},samples=2", "use_cache": str(tmp_path / "cache")}
    first = evaluate("bloblora", tasks, **options)
    assert list(tmp_path.glob("cache*.db"))
    assert evaluate("bloblora", tasks, **options) == first


def test_what_cannot_be_evaluated(train, run, tmp_path):
    for options, message in (
        ({"run": str(tmp_path)}, r"no run\.json in it"),
        ({"run": run, "samples": -1}, "samples must be 0 .* got -1"),
        (
            {"run": run, "sample": 3},
            "model_args: there is no sample; there are run, samples, seed, device, trust_remote_code, batch_size",
        ),
        ({"run": train(queries())}, "the run's task is classification, whose head scores no text"),
        ({"run": train(QUESTIONS, temperature_scaling=True, validation=0.5)}, "temperature scaling and Laplace"),
    ):
        with pytest.raises(runs.RunError, match=message):
            BlobLM(**options)


def instances(kind, arguments):
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def test_the_brier_score_of_the_harness_is_of_the_mean_likelihoods(run, tasks):
    """Σₛ pₛ(y) / Σₛ Σ_c pₛ(c), as the docs say, and not the mean of each draw's own normalized probabilities."""
    options = {"model_args": f"run={run},samples=3,seed=7", "batch_size": 4}
    found = simple_evaluate(model="bloblora", tasks=["pairs"], task_manager=tasks, bootstrap_iters=0, **options)
    loaded, of_means, of_draws = runs.load_run(run), [], []
    for question in PAIRS:
        prompt = PROMPT.format(question["question"])
        by_choice = [
            [log_likelihood(loaded, prompt, " " + choice, seed=7, number=number) for number in range(3)]
            for choice in question["choices"]
        ]
        draws, right = torch.tensor(by_choice), torch.eye(2)[question["answer"]]
        of_means.append((draws.logsumexp(1).softmax(0) - right).square().sum().item())
        of_draws.append((draws.softmax(0).mean(1) - right).square().sum().item())
    score = found["results"]["pairs"]["brier_score,none"]
    assert score == pytest.approx(sum(of_means) / len(PAIRS), abs=1e-4)
    assert abs(score - sum(of_draws) / len(PAIRS)) > 1e-3
