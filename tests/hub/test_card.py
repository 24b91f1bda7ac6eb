"""What the card says, and what it leaves out."""

import json
import re
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard

from bloblora import runs
from bloblora.hub import model_card, write_card
from bloblora.runs.evaluate import save_metrics
from tests.cli.conftest import call  # noqa: F401
from tests.hub.conftest import THREE
from tests.tiny_base import QUESTIONS, queries, write_jsonl, write_signed

PREFERENCES = [{"prompt": "Which gas?", "chosen": chosen, "rejected": "sand"} for chosen in ("iron", "carbon dioxide")]


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained.folder, tmp_path / "desk")


def test_the_metadata_is_what_the_hub_reads(folder, trained):
    write_card(folder, "user/desk", base_model="nobody/tiny")
    data = ModelCard.load(folder / "README.md").data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("nobody/tiny", "peft", "text-classification")
    assert {"bloblora", "lora", "blob"} <= set(data.tags)
    assert data.datasets is None
    results = {(r.dataset_name, r.metric_type): (r.metric_value, r.metric_args) for r in data.eval_results}
    count = {"num_samples": 3, "num_examples": 4}
    for metric in ("accuracy", "ece", "nll", "brier"):
        value, arguments = results[("private queries.jsonl", metric)]
        assert value == pytest.approx(trained.test[metric], abs=1e-4)
        assert arguments == count
    others = [name for name in results if name[0] != "private queries.jsonl"]
    assert others == [("support_desk:test", "accuracy")]  # no inf


def test_the_text_has_each_part(folder, trained):
    text = write_card(folder, "user/desk", base_model="nobody/tiny").read_text(encoding="utf-8")
    stored = json.loads((folder / "run.json").read_text())
    for part in (
        "made by bloblora with the method `blob` ([arXiv 2406.11675]",
        "classification into 2 labels: parcel, refund",
        'run = load_run("hub:user/desk")',
        'AutoPeftModelForSequenceClassification.from_pretrained("user/desk", num_labels=2)',
        "| data | private queries.jsonl |",
        "| records trained on | 4 |",
        f"| SHA-256 of the records | {stored['records_sha256']} |",
        "| r | 2 |",
        "| factors | none |",  # what `auto` stands for
        "| head_prior_std | 0.25 |",
        f"| private queries.jsonl, n = 4, N = 3 | {trained.test['accuracy']:.3f} | {trained.test['ece']:.3f}, at",
        "| support_desk:test, N = 0 | 0.250 |",
        "](reliability-test.png)",
        "label sets, with N = 3 and seed 0: at least 0.5 of the label sets hold the right label",
        "hold for data like those that they were measured on: private queries.jsonl, support_desk:test;",
    ):
        assert part in text, part
    assert str(trained.data.parent) not in text
    assert "where is my parcel" not in text


def test_what_is_missing_is_left_out(folder):
    for name in ("metrics.json", "reliability-test.png", "decision.json"):
        (folder / name).unlink()
    card = model_card(folder)
    assert card.data.eval_results is None
    assert card.data.base_model is None  # a folder on this machine
    headings = [line for line in card.text.splitlines() if line.startswith("## ")]
    assert headings == ["## Use", "## Training data", "## Settings", "## Limits"]
    assert "AutoPeftModel" not in card.text


def test_a_known_base_and_data(folder):
    run = json.loads((folder / "run.json").read_text())
    run["config"] |= {"model": "smollm2-135m", "data": "arc_easy:train"}
    (folder / "run.json").write_text(json.dumps(run))
    data = yaml.safe_load(model_card(folder).data.to_yaml())
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data["datasets"] == ["allenai/ai2_arc"]


def test_nobody_s_text_is_lost(folder, call):  # noqa: F811
    assert call("card", folder)[:2] == (0, f"written to {folder / 'README.md'}\n")
    assert call("card", folder)[0] == 0  # over its own
    (folder / "README.md").write_text("mine")
    status, _, err = call("card", folder)
    assert (status, (folder / "README.md").read_text()) == (2, "mine")
    assert "someone has written it" in err


def test_damaged_files(folder):
    (folder / "metrics.json").write_text("{")
    with pytest.raises(runs.RunError, match=r"metrics\.json: not readable as JSON"):
        model_card(folder)
    (folder / "metrics.json").unlink()
    (folder / "metrics.json").write_text('{"accuracy": 0.5}')
    with pytest.raises(runs.RunError, match=r"metrics\.json: not what `bloblora evaluate` writes"):
        model_card(folder)
    (folder / "metrics.json").unlink()
    stored = json.loads((folder / "decision.json").read_text())
    stored["decisions"][0]["adapter_sha256"] = "other"
    write_signed(folder / "decision.json", stored)
    with pytest.raises(runs.RunError, match="is for other predictions"):
        model_card(folder)


def test_an_evaluated_run_of_rewards(base, tmp_path):
    """It has a head and no labels, as a run of values has."""
    options = dict(data=PREFERENCES, model=str(base), steps=1, batch_size=2, r=2, output=str(tmp_path))
    run = runs.train(runs.RunConfig.of(**options), progress=False)
    save_metrics(runs.open_run(tmp_path), runs.evaluate(run, PREFERENCES, options=THREE), THREE, "pairs.jsonl")
    text = model_card(tmp_path).text
    assert "NLL in nats, ECE over 15 bins." in text
    assert "| pairs.jsonl, n = 2, N = 3 |" in text


@pytest.mark.parametrize(
    "records",
    [
        queries(),
        QUESTIONS,
        [{"prompt": "Which gas?", "response": "iron"}] * 2,
        PREFERENCES,
        [{"tokens": ["a", "card"], "tags": ["O", "B-thing"]}] * 2,
    ],
)
def test_the_example_runs(base, tmp_path, records):
    data = str(write_jsonl(tmp_path / "data.jsonl", records))
    options = dict(model=str(base), steps=1, batch_size=2, r=2)
    runs.train(runs.RunConfig.of(data=data, output=str(tmp_path / "run"), **options), progress=False)
    (example,) = re.findall(r"```python\n(.*?)```", model_card(tmp_path / "run").text, re.DOTALL)
    *code, last = example.replace("FOLDER", str(tmp_path / "run")).strip().splitlines()
    names = {}
    exec("\n".join(code), names)
    assert len(eval(last, names)) == 1
