"""A run called as transformers' pipelines are, against those and against `predict`."""

import numpy as np
import pytest
import torch
import transformers
from scipy.special import softmax

import bloblora
from bloblora import runs
from tests.conftest import OVER_A
from tests.tiny_base import QUESTIONS, queries, write_jsonl

TEXTS = [record["text"] for record in queries()]
FIELDS = ["label", "score", "std", "predictive_entropy", "mutual_information"]


@pytest.fixture(scope="module")
def train(base, tmp_path_factory):
    def train(records, **options):
        folder = tmp_path_factory.mktemp("run")
        data = str(write_jsonl(folder / "data.jsonl", records))
        settings = dict(model=str(base), steps=4, batch_size=2, r=2, learning_rate=0.01, init_std=0.25)
        config = runs.RunConfig.of(data=data, output=str(folder / "run"), **{**settings, **options})
        runs.train(config, progress=False)
        return config.output

    return train


@pytest.fixture(scope="module")
def folder(train):
    return train(queries())


def test_the_mean_is_what_transformers_own_pipeline_says(folder):
    run = runs.load_run(folder)
    run.model.config.id2label = dict(enumerate(run.task.labels))
    stock = transformers.pipeline("text-classification", model=run.model, tokenizer=run.tokenizer)
    ours = bloblora.pipeline(run, num_samples=0)
    for arguments in ({}, {"top_k": 1}, {"top_k": 2}, {"top_k": None}):
        for inputs in (TEXTS[0], TEXTS):
            read = run.task.template.format
            asked = read(text=inputs) if isinstance(inputs, str) else [read(text=text) for text in inputs]
            expected, found = stock(asked, **arguments), ours(inputs, **arguments)
            assert shape(found) == shape(expected)
            assert [a["label"] for a in flat(found)] == [a["label"] for a in flat(expected)]
            scores = [a["score"] for a in flat(expected)]
            assert [a["score"] for a in flat(found)] == pytest.approx(scores, abs=1e-5)
    assert all(a["std"] == a["mutual_information"] == 0 for a in flat(ours(TEXTS)))


def shape(answers):
    return [len(item) if isinstance(item, list) else "answer" for item in answers]


def flat(answers):
    return [a for item in answers for a in (item if isinstance(item, list) else [item])]


def test_the_average_over_draws(train):
    """Against draws that numpy averages, made one at a time through the posterior's own context."""
    classify = bloblora.pipeline(train(queries(), **OVER_A), num_samples=3, seed=4, batch_size=3)
    posterior, run = bloblora.find_posterior(classify.run.model), classify.run
    generator = torch.Generator().manual_seed(4)
    batch = run.tokenizer(run.task.template.format(text=TEXTS[1]), return_tensors="pt")
    draws = []
    for _ in range(3):
        with torch.no_grad(), posterior.draw(generator):
            draws.append(softmax(run.model(**batch).logits[0].double().numpy()))
    mean, std = np.mean(draws, axis=0), np.std(draws, axis=0)
    entropy = [-(p * np.log(p)).sum() for p in (mean, *draws)]
    answers = classify(TEXTS, top_k=None)[1]
    assert [list(answer) for answer in answers] == [FIELDS] * 2
    best = int(mean.argmax())
    for answer, index in zip(answers, (best, 1 - best), strict=True):
        assert answer["label"] == run.task.labels[index]
        assert answer["score"] == pytest.approx(mean[index], abs=1e-5)
        assert answer["std"] == pytest.approx(std[index], abs=1e-5)
        assert answer["predictive_entropy"] == pytest.approx(entropy[0], abs=1e-5)
        assert answer["mutual_information"] == pytest.approx(1.5 * (entropy[0] - np.mean(entropy[1:])), abs=1e-5)
    assert std.max() > 1e-3
    assert classify(iter(TEXTS)) == classify([{"text": text} for text in TEXTS])


def test_questions_with_different_numbers_of_choices(train):
    answer = bloblora.pipeline(train(QUESTIONS), num_samples=2)
    found = answer(QUESTIONS, top_k=None)
    for answers, record in zip(found, QUESTIONS, strict=True):
        assert sorted(a["label"] for a in answers) == sorted(record["choices"])
        assert sum(a["score"] for a in answers) == pytest.approx(1, abs=1e-5)
    assert [a["label"] for a in answer(QUESTIONS)] == [answers[0]["label"] for answers in found]
    (best,) = answer(QUESTIONS[0])
    assert best["label"] == found[0][0]["label"]
    with pytest.raises(runs.RunError, match="needs records with 'question' and 'choices', not 'text'"):
        answer("where is my parcel")


def test_what_is_wrong_is_said_before_a_model_is_loaded(folder, train, tmp_path):
    for options, message in (
        ({"num_samples": -1}, "samples must be 0 .* got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be in"),
    ):
        with pytest.raises(runs.RunError, match=message):
            bloblora.pipeline(tmp_path / "nowhere", **options)
    with pytest.raises(runs.RunError, match=r"no run\.json in it"):
        bloblora.pipeline(tmp_path / "nowhere")
    classify = bloblora.pipeline(folder, num_samples=0)
    with pytest.raises(runs.RunError, match="top_k must be at least 1, or None for all, got 0"):
        classify(TEXTS, top_k=0)
    assert classify([]) == []
    written = train([{"prompt": "Which gas?", "response": "carbon"}] * 2)
    with pytest.raises(runs.RunError, match="the run's task is generation, which has no labels"):
        bloblora.pipeline(written)
