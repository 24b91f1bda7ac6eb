"""Decisions of a run, from calibration to what `predict` and `evaluate` say of them."""

import json
import shutil
from pathlib import Path

import pytest

from bloblora.data import support_desk
from tests.cli.test_commands import lines
from tests.cli.test_errors import NOWHERE, fails
from tests.tiny_base import queries, write_jsonl

LAX = ("--risk", "0.9", "--confidence", "0.5", "--coverage", "0.6", "--false-alarm", "0.3", "--samples", "3")
REALIZED = ("answered", "selective_risk", "set_coverage", "set_size", "false_alarm")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Records that differ, with the labels of the tiny run."""
    texts = [record["text"] for record in support_desk("test")[:60]]
    records = [{"text": text, "label": ("parcel", "refund")[i % 2]} for i, text in enumerate(texts)]
    return write_jsonl(tmp_path_factory.mktemp("held_out") / "held_out.jsonl", records)


@pytest.fixture
def folder(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_calibrate_predict_evaluate(call, folder, held_out, files):
    status, out, _ = call("calibrate", folder, "--data", held_out, "--ood", files.outside, *LAX)
    assert status == 0
    assert "at most 0.9 of the answered are wrong, with probability 0.5, on data like the 60 calibration records" in out
    assert f"saved to {folder / 'decision.json'}" in out
    stored = json.loads((folder / "decision.json").read_text())
    run = json.loads((folder / "run.json").read_text())
    assert stored["adapter_sha256"] == run["adapter_sha256"]
    assert (stored["format_version"], stored["num_samples"], stored["seed"]) == (1, 3, 0)
    assert stored["decision"]["scope"]["num_examples"] == 60

    answers = lines(call("predict", folder, "--input", held_out, "--samples", "3")[1])
    rules = stored["decision"]
    for line in answers:
        assert line["decision"] == ("answer" if line["confidence"] > rules["answering"]["threshold"] else "abstain")
        plausible = {name for name, p in line["probabilities"].items() if 1 - p <= rules["label_sets"]["threshold"]}
        assert set(line["label_set"]) == plausible | {line["label"]}
        assert line["label_set"][0] == line["label"]
        assert line["out_of_scope"] == (line["predictive_entropy"] > rules["scope"]["threshold"])

    arguments = ("--data", held_out, "--ood", files.outside, "--samples", "3")
    result = json.loads(call("evaluate", folder, *arguments, "--json")[1])
    assert {name: result[name] for name in (*REALIZED, "detection")} == pytest.approx(stored["realized"])
    labels = [json.loads(line)["label"] for line in held_out.read_text().splitlines()]
    right = [label in line["label_set"] for label, line in zip(labels, answers, strict=True)]
    assert result["set_coverage"] == pytest.approx(sum(right) / 60)
    assert "errors among answers" in call("evaluate", folder, *arguments)[1]


def test_choices(call, choice_run, tmp_path):
    """Questions of two and three choices: no set names a choice that a question hasn't."""
    folder = shutil.copytree(choice_run, tmp_path / "run")
    questions = [
        {"question": record["text"], "choices": ["a refund", "a parcel", "a card"][: 2 + i % 2], "answer": i % 2}
        for i, record in enumerate(support_desk("test")[:40])
    ]
    data = write_jsonl(tmp_path / "questions.jsonl", questions)
    answers = lines(call("predict", folder, "--input", data, "--samples", "3")[1])
    for i, (question, line) in enumerate(zip(questions, answers, strict=True)):
        right = question["choices"].index(line["label"])
        question["answer"] = 1 - right if i % 4 == 3 and right < 2 else right
    write_jsonl(data, questions)
    options = ("--label-sets", "aps", "--score", "mutual_information", "--json")
    status, out, err = call("calibrate", folder, "--data", data, *LAX, *options)
    assert status == 0, err
    stored = json.loads(out)
    assert (stored["decision"]["label_sets"]["kind"], stored["decision"]["scope"]["score"]) == ("aps", options[3])
    answers = lines(call("predict", folder, "--input", data, "--samples", "3")[1])
    assert all(line["label_set"] and set(line["label_set"]) <= set(line["probabilities"]) for line in answers)


def test_a_calibration_of_other_predictions_is_refused(call, folder, held_out):
    assert call("calibrate", folder, "--data", held_out, *LAX)[0] == 0
    file = folder / "decision.json"
    stored = json.loads(file.read_text())
    run = json.loads((folder / "run.json").read_text())
    run["config"]["model"] = NOWHERE  # whatever is refused is refused before the model is loaded
    (folder / "run.json").write_text(json.dumps(run))
    for command in (("predict", folder, "--input", held_out), ("evaluate", folder, "--data", held_out)):
        again = "run `bloblora calibrate` again"
        fails(call(*command), "decision.json", "num_samples 3 there, 10 now", again)
        fails(call(*command, "--samples", "3", "--seed", "1"), "seed 0 there, 1 now", again)
        file.write_text(json.dumps(stored | {"adapter_sha256": "f00"}))
        fails(call(*command, "--samples", "3"), "adapter_sha256 f00 there", again)
        file.write_text(json.dumps(stored | {"format_version": 2}))
        fails(call(*command, "--samples", "3"), "format_version is 2; this bloblora reads 1")
        file.write_text(json.dumps(stored | {"decision": {}}))
        fails(call(*command, "--samples", "3"), "not what this version of bloblora writes: 'answering'")
        file.write_text(json.dumps(stored))
        fails(call(*command, "--samples", "3"), f"model '{NOWHERE}'")


def test_what_cannot_be_promised_is_not_saved(call, folder, held_out, files):
    calibrate = ("calibrate", folder, "--data", held_out)
    fails(
        call(*calibrate, *LAX, "--risk", "0.1", "--confidence", "0.9"), "no threshold on these 60 records", "the least"
    )
    fails(call(*calibrate), "risk 0.05 with probability 0.95 needs at least 93 records to calibrate on, got 60")
    fails(call(*calibrate, *LAX, "--coverage", "90"), "coverage must be in (0, 1), got 90")
    fails(call(*calibrate, *LAX, "--label-sets", "top"), "expected one of 'lac', 'aps', 'raps'")
    fails(call(*calibrate, *LAX, "--samples", "-1"), "samples must be 0")
    fails(call("calibrate", folder, "--data", files.questions, *LAX), "needs records with 'text'")
    fails(call("calibrate", folder, "--data", files.texts, *LAX), "the run was trained on these")
    fails(call(*calibrate, *LAX, "--samples", "0", "--score", "mutual_information"), "take predictive_entropy")
    assert not (folder / "decision.json").exists()


def test_help_says_what_is_promised(call):
    text = call("calibrate", "--help")[1]
    assert all(part in text for part in ("decision.json", "--false-alarm", "Example", "used for nothing else"))
    assert "bloblora calibrate" in call("--help")[1]
    assert all(name in call("predict", "--help")[1] for name in ("`abstain`", "`label_set`", "`out_of_scope`"))
    assert "selective risk" in call("evaluate", "--help")[1]


def test_a_run_without_a_calibration_says_nothing_of_decisions(call, run):
    data = Path(run).parent / "queries.jsonl"
    write_jsonl(data, queries())
    assert "decision" not in lines(call("predict", run, "--input", data, "--samples", "1")[1])[0]
