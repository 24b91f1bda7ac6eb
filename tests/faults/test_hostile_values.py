"""Values of others in messages: never raw, never long."""

import json
import shutil

import pytest

from bloblora.messages import LONGEST_LINE
from tests.tiny_base import write_signed

LONG, COLOUR = "x" * 1_000_000, "\x1b[2J\x1b]0;title\x07"


@pytest.fixture
def stored(run, tmp_path):
    """A copy of the run, of which a JSON file was changed by someone who signs it."""

    def stored(name, /, **values):
        folder = tmp_path / f"run_{len(list(tmp_path.iterdir()))}"
        shutil.copytree(run, folder)
        write_signed(folder / name, json.loads((folder / name).read_text()) | values)
        return folder

    return stored


@pytest.mark.parametrize("value", [LONG, COLOUR], ids=["long", "colour"])
def test_no_command_repeats_them(call, files, run, stored, tmp_path, value):
    def lines(*records):
        file = tmp_path / f"data_{len(list(tmp_path.iterdir()))}.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return file

    new, texts = ("--output", tmp_path / "new"), ("--data", files.texts)
    options = tmp_path / "options.yaml"
    options.write_text(json.dumps({value: value}))
    labelled = [{"text": "a", "label": label} for label in ("x", value)]
    predicted = {"probabilities": {"parcel": 0.5, value: 0.5}, "target": value}
    commands = (
        (value,),
        ("train", *texts, *new, "--model", value),
        ("train", *texts, *new, "--method", value),
        ("train", *texts, *new, "--targets", value),
        ("train", *texts, *new, "--text-column", value),
        ("train", *texts, *new, f"--{value}", "1"),
        ("train", *texts, *new, "--learning-rate", value),
        ("train", *texts, *new, "--config", options),
        ("train", *texts, *new, "--preset", value),
        ("train", *new, "--data", value),
        ("train", *new, "--data", lines(value)),
        ("train", *new, "--data", lines({"text": [value], "label": "x"})),
        ("train", *new, "--data", lines({value: "a", f"{value}2": "b"})),
        ("train", *new, "--data", lines({"question": "a", "choices": [value, "b"], "answer": f"{value}?"})),
        ("train", *new, "--data", lines({"messages": [{"role": value, "content": value}]})),
        ("evaluate", run, "--data", lines(*labelled)),
        ("evaluate", value, *texts),
        ("predict", run, "--input", value),
        ("predict", run, "--input", files.texts, "--approximate", value),
        ("predict", run, "--input", files.texts, "--device", value),
        ("predict", stored("task.json", name=value), "--input", files.texts),
        ("predict", stored("run.json", **{value: value}), "--input", files.texts),
        ("predict", stored("run.json", options={value: value}), "--input", files.texts),
        ("predict", stored("run.json", libraries={"bloblora": value}, config={value: value}), "--input", files.texts),
        ("calibrate", "--predictions", lines(predicted)),
        ("calibrate", "--predictions", lines({"probabilities": [value, value], "target": 0})),
        ("export", run, *new, "--format", value),
        ("compare", options, *new),
    )
    for command in commands:
        status, out, err = call(*command)
        shown = [f"{word!s:.40}" for word in command]
        assert (status, out) == (2, ""), shown
        assert "\x1b" not in err, shown
        assert "\x07" not in err, shown
        assert max(map(len, err.splitlines())) < 2 * LONGEST_LINE, shown
        assert len(err) < 25 * LONGEST_LINE, shown
