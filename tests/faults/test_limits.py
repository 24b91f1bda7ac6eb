"""Input that would be read, repeated or matched for ever: an error before anything expensive starts."""

import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from transformers import AutoTokenizer

from bloblora import adapter, limits
from bloblora.adapter import AdapterFileError
from bloblora.data import DataError, read_records
from bloblora.files import parse_yaml
from bloblora.runs import RunError, check_writable
from bloblora.studies import read_study
from bloblora.tasks import build_task
from tests.conftest import tiny_llama, with_lora

LETTERS = "abcdefghijkl"
BOMB = "a: &a [x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise(LETTERS))
MERGED = "a: &a {x: 1}\n" + "".join(f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in pairwise(LETTERS))
ENDLESS = r"(\w+\.?)+!"


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 0.2)


@pytest.mark.parametrize("text", [BOMB, MERGED, "a: &a [*a]\n"], ids=["lists", "merged", "itself"])
def test_aliases_that_stand_for_billions(call, tmp_path, text):
    file = tmp_path / "file.yml"
    file.write_text(text)
    reason = "its aliases repeat more than 100000 values"
    status, _, err = call("train", "--config", file)
    assert (status, err) == (2, f"bloblora train: error: --config {file}: not readable as YAML: {reason}\n")
    with pytest.raises(RunError, match=reason):
        read_study(file)
    with pytest.raises(DataError, match=reason):
        read_records(file)


def test_aliases_that_people_write():
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: *a}\n") == {"a": {"x": 1}, "b": {"x": 1, "y": {"x": 1}}}
    assert parse_yaml("# nothing\n") is None
    assert len(parse_yaml("- x\n" * 5_000)) == 5_000
    with pytest.raises(ValueError, match="nested too deep"):
        parse_yaml("[" * 10_000)
    with pytest.raises(ValueError, match="unacceptable character"):
        parse_yaml("a: \0")


def test_pipes_and_devices(call, files, run, tmp_path):
    pipe, base = tmp_path / "pipe.jsonl", tmp_path / "base"
    os.mkfifo(pipe)
    shutil.copytree(files.base, base)
    os.mkfifo(base / "added_tokens.json")
    commands = (
        ("train", "--config", pipe),
        ("train", "--config", "/dev/zero"),
        ("train", "--data", pipe, "--output", tmp_path / "out"),
        ("train", "--data", "/dev/zero", "--output", tmp_path / "out"),
        ("train", "--data", files.texts, "--model", base, "--output", tmp_path / "out"),
        ("predict", run, "--input", pipe),
        ("compare", pipe, "--output", tmp_path / "out"),
    )
    for command in commands:
        status, out, err = call(*command)
        assert (status, out) == (2, ""), command
        assert "is not a regular file" in err, command
    assert call("calibrate", run, "--predictions", pipe)[0] == 2
    status, _, err = call("predict", run, "--input", files.texts, "--output", pipe)
    assert (status, "is no regular file; give a file to write" in err) == (2, True)  # it would have been replaced
    assert pipe.is_fifo()


def test_standard_output_is_no_file_to_write(call, files, run, monkeypatch, tmp_path):
    """As root /dev/stdout, a link, would be replaced for all programs, so that no command is run here."""
    monkeypatch.chdir(tmp_path)
    before = os.dup(1)
    with (tmp_path / "out.jsonl").open("w") as handle:
        os.dup2(handle.fileno(), 1)  # as the shell's > does it
        try:
            with pytest.raises(RunError, match="/dev/stdout: is no regular file; give a file to write"):
                check_writable("/dev/stdout")
        finally:
            os.dup2(before, 1)
            os.close(before)
    status, _, err = call("predict", run, "--input", files.texts, "--output", "-")
    assert (status, "--output '-': only an input can be so" in err) == (2, True)
    assert not (tmp_path / "-").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--targets", ENDLESS), "matching the names of the model's layers takes more than 0.2 s"),
        (("--rank-pattern", json.dumps({ENDLESS: 4})), "takes more than 0.2 s"),
        (("--targets", ".*(q_proj"), "regular expression of the adapter's configuration: missing ), unterminated"),
        (("--targets", ".*no_such_layer"), "the expression matches no whole name of a layer"),
    ],
)
def test_a_pattern_of_layers(call, files, tmp_path, impatient, options, message):
    data = ("--data", files.texts, "--model", files.base, "--output", tmp_path / "out")
    status, out, err = call("train", *data, *options)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_pattern_in_an_adapters_file(tmp_path, impatient):
    with_lora(tiny_llama()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ENDLESS}))
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json: .* takes more than 0\.2 s"):
        adapter.load(tiny_llama(), tmp_path)


def encode_with_a_loop(files):
    tokenizer = AutoTokenizer.from_pretrained(files.base)
    loop = "{% for i in range(99999) %}"
    tokenizer.chat_template = loop * 2 + "{% endfor %}" * 2
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    build_task("generation", [record], tokenizer).encode(record, tokenizer)


def in_a_thread(function, *arguments):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


def test_a_chat_template(files, impatient):
    message = r"filling its chat template takes more than 0\.2 s"
    with pytest.raises(TimeoutError, match=message):
        encode_with_a_loop(files)
    with pytest.raises(TimeoutError, match=message):
        in_a_thread(encode_with_a_loop, files)  # as a server fills it


def test_a_thread_goes_on_after_its_limit(impatient):
    def spend(seconds):
        with limits.time_limit("this"):
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                pass
        return "ended"

    with ThreadPoolExecutor(2) as pool:
        long, short = pool.submit(spend, 20), pool.submit(spend, 0.01)
        assert short.result() == "ended"
        with pytest.raises(TimeoutError, match=r"this takes more than 0\.2 s"):
            long.result()
        time.sleep(0.3)
        assert [*pool.map(spend, [0.01] * 4)] == ["ended"] * 4


def test_the_callers_own_timer_stays():
    before = signal.signal(signal.SIGALRM, handler := lambda *_: None)
    try:
        signal.setitimer(signal.ITIMER_REAL, 100)
        with limits.time_limit("this"):
            pass
        assert signal.getsignal(signal.SIGALRM) is handler
        assert 90 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
