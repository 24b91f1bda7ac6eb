"""A run that learns rewards from preferences, from records to best-of-n, and what it doesn't offer."""

import json
import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, BertConfig

from bloblora import pipeline, runs
from bloblora.cli import main
from bloblora.data import DataError, columns
from bloblora.export import export
from bloblora.runs.decide import calibrate, open_decision
from bloblora.runs.folder import read_fields
from bloblora.serving import load_hosted, open_hosted
from tests.runs.conftest import train
from tests.serving.conftest import SETTINGS, serving
from tests.tasks.conftest import train_tokenizer
from tests.tiny_base import write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["card", "refund", "the", "payment", "air", "parcel", "gas", "twice"]
OPTIONS = runs.PredictionOptions(samples=3)


def worth(text):
    return sum(word in ("card", "refund", "payment") for word in text.split())


def records(count, seed=0):
    """The response with more words of money is preferred."""
    generator = random.Random(seed)
    while count:
        a, b = (" ".join(generator.choices(WORDS, k=4)) for _ in range(2))
        if worth(a) != worth(b):
            count -= 1
            chosen, rejected = sorted([a, b], key=worth, reverse=True)
            yield {"prompt": generator.choice(["what?", "the gas"]), "chosen": chosen, "rejected": rejected}


def test_a_run_learns_by_how_much_a_response_is_better(base, tmp_path):
    def first_nll(name, margin):
        data = [record | margin for record in records(30)]
        options = {"steps": 1, "batch_size": 8, "r": 2, "validation": 0, "method": "lora"}
        run = runs.train(
            runs.RunConfig.of(data=data, output=str(tmp_path / name), model=str(base), **options), progress=False
        )
        return run.training["curve"][0][1]

    assert first_nll("by_three", {"margin": 3.0}) > first_nll("plain", {}) + 1


def test_what_a_run_reads_are_the_fields_of_all_kinds_of_records():
    known = {name for names in columns._FIELDS.values() for name in names}
    record = dict.fromkeys(sorted(known), "x")
    assert read_fields(record) == record


def responses(count, seed=9):
    generator = random.Random(seed)
    texts = {" ".join(generator.choices(WORDS, k=4)): None for _ in range(count)}
    return {"prompt": "what?", "responses": [*texts]}


def test_it_learns_is_loaded_again_and_is_measured(trained):
    assert trained.task.name == "reward"
    test = [*records(60, seed=1)]
    loaded = runs.load_run(trained.config.output)
    here, there = (run.predict(test, 3, seed=2) for run in (trained, loaded))
    assert torch.equal(here.logits, there.logits)
    found = runs.evaluate(loaded, test, [responses(3)], OPTIONS)
    assert found["accuracy"] > 0.75
    assert found["nll"] < 0.6
    assert {"ece", "brier", "auroc_mutual_information"} <= {*found}
    assert {"nll", "accuracy", "ece"} == {*trained.training["held_out"]["by_num_samples"]["10"]}
    mean = loaded.predict([responses(8)], 0)
    assert torch.equal(mean.lower_bounds, mean.rewards)
    assert mean.rewards.sum().abs() < 1e-4


def test_the_best_of_several_has_the_highest_lower_bound(trained):
    asked = [responses(12), responses(1, seed=3), {"responses": ["card refund", "gas air"]}]
    prediction = trained.predict(asked, 5)
    rows = [line for line in runs.describe(trained, asked, runs.PredictionOptions(samples=5))]
    for i, (line, record) in enumerate(zip(rows, asked, strict=True)):
        n = len(record["responses"])
        assert [*line["probabilities"]] == record["responses"]
        drawn = prediction.logits[:, i, :n]
        relative = drawn - drawn.mean(-1, keepdim=True) if n > 1 else drawn
        torch.testing.assert_close(torch.tensor(line["rewards"]), relative.mean(0))
        torch.testing.assert_close(torch.tensor(line["reward_stds"]), relative.std(0, correction=0))
        bounds = relative.mean(0) - relative.std(0, correction=0)
        torch.testing.assert_close(torch.tensor(line["lower_bounds"]), bounds)
        assert line["best"] == record["responses"][bounds.argmax()]
    assert worth(rows[0]["best"]) >= 2
    alone = [trained.predict([{"prompt": "what?", "responses": [one]}], 5).logits for one in asked[0]["responses"]]
    torch.testing.assert_close(torch.cat(alone, -1)[:, 0], prediction.logits[:, 0, :12], rtol=1e-4, atol=1e-4)
    assert pipeline(trained, num_samples=5)(asked[0])[0]["best"] == rows[0]["best"]


def test_kept_predictions_promises_and_the_server(trained, tmp_path):
    test, folder = [*records(40, seed=1)], trained.config.output
    far = [responses(n, seed=n) for n in (1, 2, 5)]
    kept = runs.evaluate(trained, test, far, OPTIONS, predictions=tmp_path / "kept.jsonl")
    assert kept == pytest.approx(runs.evaluate(trained, test, far, OPTIONS), rel=1e-4)
    assert runs.evaluate(trained, test, far, OPTIONS, predictions=tmp_path / "kept.jsonl") == kept
    assert json.loads((tmp_path / "kept.jsonl").read_text().splitlines()[0])["target"] == test[0]["chosen"]
    entry = calibrate(runs.open_run(folder), test, options=SETTINGS, coverage=0.8)
    assert entry["realized"]["set_coverage"] >= 0.8
    pairs = write_jsonl(tmp_path / "pairs.jsonl", test)
    main(["predict", folder, "--input", str(pairs), "--samples", "3", "--output", str(tmp_path / "lines.jsonl")])
    (own,) = (Path(folder) / "calibration").glob("*.jsonl")
    for beside in ([str(own)], [str(tmp_path / "lines.jsonl"), "--data", str(pairs)]):
        main(["calibrate", folder, "--predictions", *beside, "--samples", "3", "--coverage", "0.8"])
        (again,) = json.loads((Path(folder) / "decision.json").read_text())["decisions"]
        found, expected = (one["decision"]["label_sets"]["threshold"] for one in (again, entry))
        assert found == pytest.approx(expected, rel=1e-4)
    decision = open_decision(runs.open_run(folder), SETTINGS)
    asked = responses(2)
    (line,) = runs.describe(trained, [asked], SETTINGS, decision)
    hosted = load_hosted(open_hosted([f"rewards={folder}"], SETTINGS), SETTINGS)
    with serving(hosted) as client:
        answer = client.post("/v1/predict", json={"inputs": asked})
        assert answer.status_code == 200, answer.text
        (served,) = answer.json()["answers"]
        wrong = client.post("/v1/predict", json={"inputs": "card"})
        (model,) = client.get("/v1/models").json()["models"]
    assert (served["best"], served["label_set"]) == (line["best"], line["label_set"])
    for name in ("rewards", "reward_stds", "lower_bounds"):
        assert served[name] == pytest.approx(line[name], rel=1e-3, abs=1e-4)
    assert wrong.status_code == 422
    assert "needs 'responses'" in wrong.text
    assert model["kind"] == "preference"


def test_an_export_is_a_reward_model_of_transformers(trained, tmp_path):
    """One text after the other, right-padded or not, as others would score them."""
    manifest = export(trained.config.output, tmp_path / "out", num_samples=1, seed=5)
    plain = AutoModelForSequenceClassification.from_pretrained(manifest.base_model, num_labels=1, pad_token_id=0)
    model = PeftModel.from_pretrained(plain, tmp_path / "out" / "draw_00").eval()
    assert any("is the reward of a prompt with its response" in warning for warning in manifest.warnings)
    asked, tokenizer = responses(4), trained.tokenizer
    divided = trained.predict([asked], 1, seed=5).logits[0, 0] * manifest.temperature
    for text, expected in zip(asked["responses"], divided, strict=True):
        ids = tokenizer(f"{asked['prompt']} {text}{tokenizer.eos_token}", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found = model(input_ids=ids).logits[0, 0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_from_the_command_line(base, tmp_path, capsys):
    file = str(
        write_jsonl(
            tmp_path / "pairs.jsonl", [{"win": r["chosen"], "lose": r["rejected"], "by": 0.5} for r in records(30)]
        )
    )
    columns = ["--chosen-column", "win", "--rejected-column", "lose", "--margin-column", "by"]
    shape = ["--steps", "3", "--batch-size", "8", "--r", "2", "--model", str(base), "--output", str(tmp_path / "run")]
    main(["train", "--data", file, *columns, *shape])
    main(["evaluate", str(tmp_path / "run"), "--data", file, "--samples", "2"])
    assert "accuracy" in capsys.readouterr().out
    (tmp_path / "in.jsonl").write_text(json.dumps({"responses": ["card", "gas", "the air"]}) + "\n")
    main(["predict", str(tmp_path / "run"), "--input", str(tmp_path / "in.jsonl"), "--samples", "2"])
    assert json.loads(capsys.readouterr().out)["best"] in ("card", "gas", "the air")


@pytest.mark.parametrize("method", ["ensemble", "laplace-lora", "tfb", "distilled"])
def test_other_methods_give_rewards_too(base, tmp_path, method):
    run = train(base, tmp_path, [*records(24)], method=method)
    asked = [responses(3), *records(2, seed=1)]
    found = runs.load_run(run.config.output).predict(asked, 3)
    torch.testing.assert_close(found.logits, run.predict(asked, 3).logits)
    assert found.log_probabilities[0].isfinite().all()


def test_what_has_no_form_for_rewards_is_refused_early(base, trained, tmp_path):
    for options, message in (({"label_smoothing_factor": 0.1}, "label_smoothing_factor is for classes"),):
        with pytest.raises(runs.RunError, match=message):
            train(base, tmp_path, [*records(20)], **options)
    bert = dict(vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0)
    BertConfig(**bert).save_pretrained(tmp_path / "bert")  # no weights, which aren't looked for
    train_tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(runs.RunError, match=r"has no head named 'score': .* needs a causal model"):
        train(tmp_path / "bert", tmp_path, [*records(20)])
    with pytest.raises(runs.RunError, match="approximate 'stop' is for classes and choices"):
        runs.load_run(trained.config.output, "stop")
    with pytest.raises(DataError, match="field 'chosen': missing"):
        runs.RunConfig.of(data=[responses(3)], output=str(tmp_path / "run"), model=str(base), steps=1)
