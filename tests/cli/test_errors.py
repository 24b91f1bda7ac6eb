"""Whatever is wrong: exit status 2, one message, no traceback, and before anything that takes long."""

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import HEAD, LEARNT, SETTINGS
from tests.tiny_base import write_jsonl, write_signed

NOWHERE = "./no-such-model"  # a model that can't be loaded: whatever is reported before it was found before it


def fails(result, *parts):
    status, out, err = result
    assert status == 2
    assert out == ""
    assert err.count("error: ") == 1, err
    assert err.startswith("bloblora")
    assert "Traceback" not in err
    for part in parts:
        assert part in err


@pytest.fixture
def train(call, files, tmp_path):
    def train(*arguments, data=files.texts, model=NOWHERE, output=None):
        return call("train", "--data", data, "--model", model, "--output", output or tmp_path / "run", *arguments)

    return train


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--nope", "3"), ["unknown option 'nope'", "see bloblora train --help"]),
        (("--steps", "many"), ["--max-steps: expected int or 'auto'. Got value: many"]),
        (("--learning-rate", "fast"), ["--learning-rate: expected float or 'auto'. Got value: fast"]),
        (("--method", "nope"), ["method 'nope' is not one of lora, map, "]),
        (("--task", "essay"), ["task 'essay' is not one of auto, regression, multi_label, classification, "]),
        (
            ("--steps", "0", "--limit", "-1"),
            ["max_steps must be at least 1", "limit must be at least 1, got -1"],
        ),
        (("--batch-size", "0"), ["per_device_train_batch_size must be at least 1, got 0"]),
        (("--prior-std", "-1"), ["prior_std must be a finite number above 0, got -1"]),
        (("--prior-std", "wide"), ["--prior-std: expected float or 'auto' or 'start'. Got value: wide"]),
        (("--prior-mean", "zeros"), ["--prior-mean: expected one of 'auto', 'zero', 'start'. Got value: zeros"]),
        (("--seed", "-1"), ["seed must be in 0..2^32 - 1, got -1"]),
        (("--config", "none.yaml"), ["none.yaml"]),
        (("--preset", "papers"), ["preset 'papers' is not one of bbb, "]),
        (("--task", "choice_text"), ["task 'choice_text' needs records with 'question' and 'choices'"]),
    ],
)
def test_options_of_train(train, arguments, parts):
    fails(train(*arguments), *parts)


def test_data_is_read_before_the_model(train, files):
    advice = "\n--skip-invalid leaves such rows out"
    fails(train(data=files.bad), f"{files.bad}:5: field 'text': ''", f"{files.bad}:5: field 'label': missing", advice)
    fails(train(data="nowhere.jsonl"), "no such file or folder")
    fails(train(), f"model '{NOWHERE}': no such folder")


def test_an_unknown_model_on_the_hub(train):
    fails(train(model="nobody/nothing"), "model 'nobody/nothing' can't be loaded", "a folder, or a .gguf file")


def test_unknown_layers_to_adapt(train, files):
    fails(
        train("--target-modules", "[nosuch]", "--steps", "1", model=files.base),
        "the model has no layer nosuch; its layers:",
        "q_proj",
    )


def test_outputs_that_cannot_be_written(train, call, run, files, tmp_path):
    (tmp_path / "file").write_text("mine")
    inside = tmp_path / "file" / "x"
    fails(train(output=tmp_path / "file"), "is a file; give a folder")
    fails(train(output=inside), "can't be written")
    for command in (
        ("evaluate", "--data", files.texts),
        ("predict", "--input", files.texts),
    ):
        # the run doesn't exist either, and so no model could be loaded before this
        fails(call(command[0], NOWHERE, *command[1:], "--output", inside), "can't be written")
        fails(call(command[0], NOWHERE, *command[1:], "--output", tmp_path), "is a folder; give a file")
    fails(call("evaluate", NOWHERE, "--data", files.texts, "--diagram", inside), "can't be written")
    fails(call("demo", "--output", inside, "--steps", "1"), "can't be written")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("command", "read", "written"),
    [
        ("predict", "--input", "--output"),
        ("generate", "--input", "--output"),
        ("score", "--input", "--output"),
        ("evaluate", "--data", "--output"),
        ("evaluate", "--data", "--predictions"),
        ("evaluate", "--ood", "--diagram"),
        ("calibrate", "--data", "--output"),
        ("calibrate", "--ood", "--output"),
        ("calibrate", "--predictions", "--output"),
    ],
)
@pytest.mark.parametrize("link", ["none", "soft", "hard"])
def test_what_is_read_is_not_written(call, files, tmp_path, command, read, written, link):
    own, other = tmp_path / "own.jsonl", tmp_path / "other.jsonl"
    own.write_text(text := Path(files.texts).read_text())
    if link != "none":
        other.symlink_to(own) if link == "soft" else other.hardlink_to(own)
    target = tmp_path / "." / "own.jsonl" if link == "none" else other
    data = () if read == "--data" or command not in ("evaluate", "calibrate") else ("--data", files.texts)
    message = f"{written} '{target}': is the same file as {read} '{own}'; give another"
    fails(call(command, NOWHERE, *data, read, own, written, target), message)
    assert own.read_text() == text


def test_outputs_that_are_one_file(call, files, tmp_path):
    both = ("--output", tmp_path / "a.json", "--predictions", tmp_path / "a.json")
    fails(call("evaluate", NOWHERE, "--data", files.texts, *both), "is the same file as --output")


def test_inputs_that_are_one_stream(call, tmp_path):
    once = "'-': standard input is read once; give a file for one of them"
    for command in ("evaluate", "calibrate"):
        fails(call(command, NOWHERE, "--data", "-", "--ood", "-"), f"--data and --ood {once}")
    fails(
        call("train", "--data", "-", "--validation", "-", "--output", tmp_path / "run"), f"data and validation {once}"
    )


@pytest.mark.parametrize(
    "arguments", [(), ("--version-number",), ("nope",), ("evaluate",), ("evaluate", "--data", "x"), ("predict", "run")]
)
def test_commands_that_lack_something(call, arguments):
    fails(call(*arguments), "--help")


@pytest.mark.parametrize("command", [("evaluate", "--data"), ("predict", "--input")])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--samples", "-1"), "samples must be 0 (the mean) or more, got -1"),
        (("--batch-size", "0"), "batch_size must be at least 1, got 0"),
        (("--seed", "-1"), "seed must be in"),
        (("--samples", "few"), "--samples: expected int. Got value: few"),
    ],
)
def test_options_of_evaluate_and_predict(call, files, command, arguments, message):
    fails(call(command[0], NOWHERE, command[1], files.texts, *arguments), message)


@pytest.mark.parametrize("arguments", [("--samples", "-1"), ("--limit", "0"), ("--steps", "0"), ("--seed", "-1")])
def test_options_of_demo(call, tmp_path, arguments):
    fails(call("demo", "--output", tmp_path / "demo", *arguments), arguments[0][2:])
    assert not list(tmp_path.rglob("run.json"))


@pytest.fixture
def lost_base(run, tmp_path):
    """A run whose base model is gone: what is wrong besides must be found before it is missed."""

    def copy(source=run):
        folder = tmp_path / "copy"
        shutil.copytree(source, folder)
        stored = json.loads((folder / "run.json").read_text())
        stored["config"]["model"] = NOWHERE
        (folder / "run.json").write_text(json.dumps(stored))
        return folder

    return copy


def test_data_that_does_not_fit_the_run(call, lost_base, files, tmp_path):
    folder = lost_base()
    for source, parts in (
        (files.unknown, ["record 5: field 'label': 'other'", "is not one of 2 labels: parcel, refund"]),
        (files.questions, ["needs records with 'text', not 'question' and 'choices'"]),
        (files.bad, [":5: field 'text': ''"]),
        (files.outside, ["field 'label': missing"]),
        ("nowhere.csv", ["no such file"]),
    ):
        fails(call("evaluate", folder, "--data", source), source, *parts)
    fails(call("evaluate", folder, "--data", files.texts, "--ood", files.questions), files.questions, "not 'question'")
    others = [{"text": f"{i}", "label": "ab"[i % 4 == 3]} for i in range(40)]
    for command in ("evaluate", "calibrate"):
        status, _, err = call(command, folder, "--data", write_jsonl(tmp_path / "others.jsonl", others))
        first, *lines = err.splitlines()
        assert (status, first.endswith("40 answers that the run can't be measured by:")) == (2, True)
        assert lines == [
            f"record {places}: field 'label': '{name}' is not one of 2 labels: parcel, refund."
            for places, name in (("1, 2, 3, 5, 6 and 25 more", "a"), ("4, 8, 12, 16, 20 and 5 more", "b"))
        ]
    fails(call("predict", folder, "--input", files.questions), files.questions, "needs records with 'text'")
    fails(call("predict", folder, "--input", files.bad), ":5: field 'text': ''")
    fails(call("evaluate", folder, "--data", files.texts), f"model '{NOWHERE}': no such folder")


def test_texts_for_a_run_that_answers_questions(call, lost_base, choice_run, files):
    fails(call("predict", lost_base(choice_run), "--input", files.texts), "'question' and 'choices', not 'text'")


def test_folders_that_are_no_finished_run(call, lost_base, files, tmp_path):
    fails(call("info", tmp_path / "nowhere"), "no run.json in it; give a folder that `bloblora train` wrote")
    folder = lost_base()
    weights = folder / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for command in (("info",), ("evaluate", "--data", files.texts), ("predict", "--input", files.texts)):
        fails(call(command[0], folder, *command[1:]), "SHA-256", "adapter_model.safetensors")
    stored = json.loads((folder / "run.json").read_text())
    write_signed(folder / "run.json", {name: value for name, value in stored.items() if name != "training"})
    fails(call("info", folder), "its training isn't finished; run the same `bloblora train` again")


def test_a_run_whose_base_model_has_moved(call, run, files, tmp_path):
    """`run.json` can be told where it lies now, and both messages say so."""
    folder, base = tmp_path / "run", tmp_path / "base"
    shutil.copytree(run, folder)
    shutil.copytree(files.base, base)
    place(folder, tmp_path / "before")
    train = ("train", "--data", files.texts, "--model", base, "--output", folder, *SETTINGS, *LEARNT, *HEAD)
    predict = ("predict", folder, "--input", files.texts)
    gone = f"model '{tmp_path / 'before'}': no such folder; if it has moved, name its place in {folder / 'run.json'}"
    fails(call(*predict), gone, "as 'model'")
    fails(call(*train), f"choose another output; or if that has only moved, name its place in {folder / 'run.json'}")
    place(folder, base)
    assert [call(*predict)[0], call(*train)[0]] == [0, 0]


def place(folder, base):
    """As a person writes it, who can't make a hash."""
    stored = json.loads((folder / "run.json").read_text())
    stored["config"]["model"] = str(base)
    (folder / "run.json").write_text(json.dumps(stored))


def test_a_run_of_another_configuration(call, run, files):
    before = {file: file.read_bytes() for file in Path(run).iterdir()}
    arguments = ("train", "--data", files.texts, "--model", files.base, "--output", run, "--steps", "3")
    fails(call(*arguments), "another configuration", "max_steps: 2 there, 3 now", "choose another output")
    assert {file: file.read_bytes() for file in Path(run).iterdir()} == before
