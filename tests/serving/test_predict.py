"""Answers over HTTP: the numbers of `predict`, alone and among others."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bloblora import runs
from bloblora.runs.decide import open_decision
from tests.serving.conftest import SETTINGS, serving
from tests.tiny_base import QUESTIONS, queries

RECORDS = {
    "desk": [{"text": record["text"]} for record in queries()],
    "quiz": [{key: record[key] for key in ("question", "choices")} for record in QUESTIONS],
}
RECORDS["lora"] = RECORDS["three"] = RECORDS["desk"]


def ask(client, inputs, **fields):
    response = client.post("/v1/predict", json={"inputs": inputs, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def close(answer, expected):
    assert answer["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)
    for name in ("confidence", "predictive_entropy", "mutual_information", "expected_entropy"):
        assert answer[name] == pytest.approx(expected[name], abs=1e-5)
    for name in ("label", "decision", "label_set", "out_of_scope"):
        assert answer.get(name) == expected.get(name)


@pytest.mark.parametrize("name", [*RECORDS])
@pytest.mark.parametrize("num_samples", [0, 3, 7])
def test_answers_are_those_of_predict(client, folders, name, num_samples):
    decision = open_decision(runs.open_run(folders[name]), SETTINGS) if num_samples == 3 else None
    run = runs.load_run(folders[name])
    expected = [*runs.describe(run, RECORDS[name], runs.PredictionOptions(samples=num_samples), decision)]
    found = ask(client, RECORDS[name], model=name, samples=num_samples)
    assert (found["model"], found["samples"]) == (name, num_samples)
    draws = run.predict(RECORDS[name], num_samples).draw_probabilities.double()
    assert len(found["answers"]) == len(RECORDS[name])
    for i, (answer, line) in enumerate(zip(found["answers"], expected, strict=True)):
        close(answer, line)
        assert ("decision" in answer) == (name == "desk" and num_samples == 3)
        assert list(answer["probabilities"]) == list(answer["std"]) == list(line["probabilities"])
        mean_square = draws[:, i].square().mean(0) - draws[:, i].mean(0).square()
        std = mean_square.clamp_min(0).sqrt()[: len(answer["std"])]
        torch.testing.assert_close(torch.tensor([*answer["std"].values()]).double(), std, atol=1e-4, rtol=0)
        assert answer["num_draws"] == (1 if name == "lora" or num_samples == 0 else num_samples)


def test_one_input_without_a_list(client):
    one, many = ask(client, RECORDS["desk"][0], model="desk"), ask(client, RECORDS["desk"][:1], model="desk")
    close(one["answers"][0], many["answers"][0])
    assert len(one["answers"]) == 1
    assert one["samples"] == SETTINGS.samples


@pytest.mark.parametrize("extra", [{}, {"parameters": {}}])
def test_texts_as_hugging_face_sends_them(client, extra):
    texts = [record["text"] for record in RECORDS["desk"]]
    expected = ask(client, RECORDS["desk"], model="desk")["answers"]
    (one,), many = (ask(client, inputs, model="desk", **extra)["answers"] for inputs in (texts[0], texts))
    for answer, record in zip([one, *many], [expected[0], *expected], strict=True):
        close(answer, record)


def test_equal_choices_are_told_apart(client):
    answer = ask(client, {"question": "What?", "choices": ["a card", "a card"]}, model="quiz")["answers"][0]
    assert answer["probabilities"] == pytest.approx({"0: a card": 0.5, "1: a card": 0.5}, abs=1e-5)


def test_concurrent_requests_get_the_answers_that_each_gets_alone(client):
    """Of all runs and two N, each several times and of different lengths, from eight clients at once."""
    asked = [(name, [record], n) for name, records in RECORDS.items() for record in records for n in (3, 5)]
    alone = [ask(client, inputs, model=name, samples=n)["answers"][0] for name, inputs, n in asked]
    with ThreadPoolExecutor(8) as pool:
        together = [*pool.map(lambda a: ask(client, a[1], model=a[0], samples=a[2])["answers"][0], asked * 3)]
    for answer, expected in zip(together, alone * 3, strict=True):
        close(answer, expected)


def test_a_text_longer_than_the_model_reads(hosted, monkeypatch):
    """Its end is cut off, and the answer says how much."""
    from dataclasses import replace

    task = hosted["desk"].run.task
    monkeypatch.setattr(hosted["desk"].run, "task", replace(task, max_length=4, template="{text}"))
    text = "where is my parcel"
    tokens = len(hosted["desk"].run.tokenizer(text)["input_ids"])
    with serving({"desk": hosted["desk"]}) as client:
        assert ask(client, {"text": text})["answers"][0]["truncated_tokens"] == tokens - 4


def test_models(client, hosted, folders):
    models = {model["name"]: model for model in client.get("/v1/models").json()["models"]}
    assert list(models) == list(folders)
    assert (models["desk"]["kind"], models["quiz"]["kind"]) == ("text", "choice")
    assert (models["desk"]["labels"], models["quiz"]["labels"]) == (["parcel", "refund"], None)
    assert models["lora"]["method"] == "lora"
    assert "at most 0.9 of the answered are wrong" in models["desk"]["promises"]["answering"]
    assert models["lora"]["promises"] is None
    assert (models["desk"]["deterministic"], models["lora"]["deterministic"]) == (False, True)
    assert models["desk"]["purpose"] == "Sorts a text into one of 2 labels: parcel, refund."
    assert models["quiz"]["purpose"] == "Answers a question by one of the choices that come with it."
    assert [record["text"] for record in models["desk"]["examples"][:2]] == ["parcel", "refund"]
    assert all(len(model["examples"]) == 3 and model["warnings"] == [] for model in models.values())
    assert (models["desk"]["metrics"], models["desk"]["diagram"]) == ({}, False)
    assert client.get("/v1/models/desk/reliability.png").status_code == 404


def test_health_and_metrics(hosted):
    with serving({"desk": hosted["desk"]}) as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/ready").json() == {"status": "ready"}
        for path in ("/health", "/ready"):
            head = client.head(path)
            assert (head.status_code, head.content) == (200, b"")
        ask(client, RECORDS["desk"], samples=2)
        ask(client, RECORDS["desk"][0], samples=5)
        client.get("/nowhere")
        client.post("/v1/predict", json={})
        values = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    assert values['bloblora_requests_total{path="/v1/predict",status="200"}'] == "2.0"
    assert values['bloblora_requests_total{path="/v1/predict",status="422"}'] == "1.0"
    assert values['bloblora_requests_total{path="other",status="404"}'] == "1.0"
    assert values['bloblora_request_seconds_count{path="/v1/predict"}'] == "3.0"
    assert values["bloblora_queue_length"] == "0.0"
    assert values['bloblora_batch_size_sum{model="desk"}'] == "5.0"
    assert values['bloblora_draws_total{model="desk"}'] == "13.0"  # 4 inputs × 2 and 1 × 5
    assert float(values["process_resident_memory_bytes"]) > 1e7
