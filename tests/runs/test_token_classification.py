"""A run that tags words, from records to entities, and what it doesn't offer."""

import json
import random

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForMaskedLM, AutoModelForTokenClassification, BertConfig

from bloblora import pipeline, runs
from bloblora.cli import main
from bloblora.decision import PromiseError
from bloblora.export import export
from bloblora.hub import model_card
from bloblora.runs.decide import calibrate, open_decision
from bloblora.serving import load_hosted, open_hosted
from bloblora.tasks.token_classification import entities_of
from tests.runs.conftest import train
from tests.serving.conftest import SETTINGS, serving
from tests.tasks.conftest import train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
THINGS = {"thing": [["card"], ["second", "payment"]], "stuff": [["iron"], ["carbon", "dioxide"]]}
OPTIONS = runs.PredictionOptions(samples=3)
TRAINING = {"steps": 40, "batch_size": 8, "learning_rate": 0.02, "eval_steps": 40}


def records(count, seed=0):
    """Entities of one or two words between others; "card" and "carbon" begin alike."""
    generator = random.Random(seed)
    for _ in range(count):
        tokens, tags = [], []
        for kind in generator.choices([*THINGS, "O", "O"], k=generator.randint(2, 4)):
            words = [generator.choice(["the", "was", "please"])] if kind == "O" else generator.choice(THINGS[kind])
            tokens += words
            tags += ["O"] if kind == "O" else [f"{'I' if place else 'B'}-{kind}" for place in range(len(words))]
        yield {"tokens": tokens, "tags": tags}


def test_it_learns_is_loaded_again_and_is_measured(trained):
    assert trained.task.name == "token_classification"
    test = [*records(40, seed=1)]
    loaded = runs.load_run(trained.config.output)
    here, there = (run.predict(test, 3, seed=2) for run in (trained, loaded))
    assert torch.equal(here.logits, there.logits)
    found = runs.evaluate(loaded, test, [{"tokens": ["gas", "air"]}], OPTIONS)
    assert found["token_accuracy"] > 0.9
    assert found["entity_f1"] > 0.8
    assert {"nll", "token_nll", "token_ece", "entity_ece", "auroc_mutual_information"} <= {*found}
    alone = torch.cat([loaded.predict([record], 3, seed=2).probabilities.sum(1) for record in test])
    torch.testing.assert_close(alone, here.probabilities.sum(1), rtol=1e-3, atol=1e-4)
    assert {"nll", "token_accuracy", "entity_f1"} == {*trained.training["held_out"]["by_num_samples"]["10"]}


def test_lines_kept_predictions_promises_and_the_server(trained, tmp_path):
    test, folder = [*records(60, seed=1)], trained.config.output
    asked = {"tokens": ["the", "second", "payment", "was", "the", "card"]}
    kept = runs.evaluate(trained, test, [asked], OPTIONS, predictions=tmp_path / "kept.jsonl")
    assert kept == pytest.approx(runs.evaluate(trained, test, [asked], OPTIONS), rel=1e-4)
    assert runs.evaluate(trained, test, [asked], OPTIONS, predictions=tmp_path / "kept.jsonl") == kept
    description = runs.open_run(folder)
    entry = calibrate(description, test, options=SETTINGS, coverage=0.8)
    assert entry["realized"]["set_coverage"] >= 0.8
    assert {*entry["promises"]} == {"tag_sets", "scope"}
    (own,) = (description.folder / "calibration").glob("*.jsonl")
    main(["calibrate", folder, "--predictions", str(own), "--samples", "3", "--coverage", "0.8"])
    (again,) = json.loads((description.folder / "decision.json").read_text())["decisions"]
    for rule in ("tag_sets", "scope"):
        assert again["decision"][rule]["threshold"] == pytest.approx(entry["decision"][rule]["threshold"], rel=1e-3)
    decision = open_decision(description, SETTINGS)
    (line,) = runs.describe(trained, [asked], SETTINGS, decision)
    found = [(one["entity"], one["start"], one["end"]) for one in line["entities"]]
    assert found == entities_of(line["tags"])
    assert [one["text"] for one in line["entities"]] == [" ".join(asked["tokens"][a:b]) for _, a, b in found]
    assert "second payment" in [one["text"] for one in line["entities"]]
    assert all(tag in tags for tag, tags in zip(line["tags"], line["tag_sets"], strict=True))
    assert pipeline(trained, num_samples=SETTINGS.samples)(asked)[0]["tags"] == line["tags"]
    with serving(load_hosted(open_hosted([f"ner={folder}"], SETTINGS), SETTINGS)) as client:
        answer = client.post("/v1/predict", json={"inputs": [asked, {"tokens": ["card"]}]})
        assert answer.status_code == 200, answer.text
        served, other = answer.json()["answers"]
        wrong = client.post("/v1/predict", json={"inputs": "card"})
        (model,) = client.get("/v1/models").json()["models"]
    assert served.pop("num_draws") == SETTINGS.samples
    assert {name: line[name] for name in ("tags", "tag_sets", "out_of_scope", "tokens")}.items() <= served.items()
    assert served["token_entropy"] == pytest.approx(line["token_entropy"], rel=1e-2, abs=1e-4)
    assert len(other["tags"]) == len(other["token_confidence"]) == 1
    assert wrong.status_code == 422
    assert "needs 'tokens'" in wrong.text
    assert model["kind"] == "tokens"
    with pytest.raises(ValueError, match=r"risk, confidence and label_sets are for classes"):
        calibrate(description, test, options=SETTINGS, risk=0.2)
    few = [{"tokens": ["yes", *one["tokens"]], "tags": ["O", *one["tags"]]} for one in test[:3]]
    with pytest.raises(PromiseError, match=r"coverage 0.9 needs at least 9 records"):
        calibrate(description, few, options=SETTINGS)


def test_an_export_is_a_token_classifier_of_transformers(trained, tmp_path):
    manifest = export(trained.config.output, tmp_path / "out", num_samples=1, seed=5)
    plain = AutoModelForTokenClassification.from_pretrained(manifest.base_model, num_labels=5)
    model = PeftModel.from_pretrained(plain, tmp_path / "out" / "draw_00").eval()
    assert any("a word's tag at the last of its tokens" in warning for warning in manifest.warnings)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]["4"] == "O"
    (record,) = records(1, seed=7)
    example = trained.task.encode(record, trained.tokenizer)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0, example["places"]]
    ours = trained.predict([record], 1, seed=5).probabilities[0]
    torch.testing.assert_close((logits / manifest.temperature).softmax(-1), ours, rtol=1e-3, atol=1e-4)
    card = str(model_card(trained.config.output, "me/ner", "me/base"))
    assert "AutoPeftModelForTokenClassification" in card
    assert "token-classification" in card


def test_from_the_command_line_on_an_encoder(tmp_path, capsys):
    torch.manual_seed(1)
    config = BertConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "bert")
    train_tokenizer().save_pretrained(tmp_path / "bert")
    lines = [[f"{word} {tag}\n" for word, tag in zip(*r.values(), strict=True)] for r in records(40)]
    (tmp_path / "data.conll").write_text("\n".join("".join(sentence) for sentence in lines))
    data, run = ["--data", str(tmp_path / "data.conll")], str(tmp_path / "run")
    shape = ["--steps", "2", "--batch-size", "8", "--r", "2", "--model", str(tmp_path / "bert"), "--output", run]
    main(
        [
            "train",
            *data,
            *shape,
            "--sub-token",
            "first",
            "--label-smoothing-factor",
            "0.1",
            "--class-weights",
            "balanced",
        ]
    )
    main(["evaluate", run, *data, "--samples", "2"])
    assert "F1" in capsys.readouterr().out
    (tmp_path / "in.jsonl").write_text('{"words": ["card", "iron"]}\n')
    table = ["--tokens-column", "words", "--output", str(tmp_path / "out.csv")]
    main(["predict", run, "--input", str(tmp_path / "in.jsonl"), "--samples", "2", *table])
    assert (tmp_path / "out.csv").read_text().startswith("tokens,tags,entities,token_confidence")


@pytest.mark.parametrize("method", ["ensemble", "tfb", "distilled"])
def test_other_methods_tag_too(base, tmp_path, method):
    run = train(base, tmp_path, [*records(8)], method=method, steps=1)
    asked = [{"tokens": ["card"]}, *records(2, seed=1)]
    found = runs.load_run(run.config.output).predict(asked, 3)
    torch.testing.assert_close(found.logits, run.predict(asked, 3).logits)
    assert found.probabilities[0].sum(-1).tolist() == pytest.approx([1.0] + [0.0] * (found.tokens.shape[1] - 1))


def test_what_has_no_form_for_tags_is_refused_early(base, trained, tmp_path):
    for options, message in (
        ({"method": "laplace-lora"}, "method 'laplace-lora' has no form for task 'token_classification'"),
        ({"temperature_scaling": True, "validation": [{"tokens": ["a"], "tags": ["B-x"]}]}, "'tags': 'B-x' not among"),
    ):
        with pytest.raises(runs.RunError, match=message):
            train(base, tmp_path, [*records(8)], **options)
    with pytest.raises(runs.RunError, match="approximate 'stop' is for classes and choices"):
        runs.load_run(trained.config.output, "stop")
