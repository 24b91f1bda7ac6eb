"""To a hub and back: the real client under the command line, in a process of its own, against tests/hub/server.py."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bloblora import hub as bloblora_hub
from bloblora import runs
from bloblora.hub.push import _make_public, stage
from tests.hub import server
from tests.tiny_base import queries, write_jsonl, write_signed

# huggingface_hub reads its environment once, so commands that have it in common share a process
_COMMANDS = """
import contextlib, io, json, os, sys
from bloblora.cli import main
from bloblora.runs import folder

results = []
for token, arguments in json.load(sys.stdin):
    folder._fetched.cache_clear()
    os.environ["HF_TOKEN"] = token
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as exit_:
            status = exit_.code
    results.append((status, out.getvalue(), err.getvalue()))
json.dump(results, sys.stdout)
"""
_STOCK = """
import json, sys
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("tiny")
model = AutoPeftModelForSequenceClassification.from_pretrained("user/desk", num_labels=2).eval()  # as the card says
text = 'This sentence: "where is my parcel" means in one word: "'  # as the card says, too
logits = model(**tokenizer(text, return_tensors="pt")).logits
json.dump(logits.softmax(-1)[0].tolist(), sys.stdout)
"""
_SERVED = """
import json, sys
from pathlib import Path
from bloblora.serving import Settings
from bloblora.serving.hosted import Hosted, open_hosted

opened = open_hosted(["hub:user/desk", "next=hub:user/desk@next"], Settings(samples=3))
metrics = {name: Hosted(name, run.folder, None, None, None, []).metrics for name, run in opened.items()}
served = metrics, [file.name for file in opened["desk"].folder.glob("*.png")]
"""
_FACTS = """
from bloblora import models

name = "user/plain"
facts = models.hidden_size(name), models.is_half(name), models.hidden_size(name)
json.dump([served, facts], sys.stdout)
"""


@pytest.fixture(scope="module")
def hub():
    with server.running() as hub:
        yield hub


@pytest.fixture(scope="module")
def place(tmp_path_factory, base):
    """Where commands run: there ``tiny`` is a base model, as by a hub id."""
    folder = tmp_path_factory.mktemp("place")
    os.symlink(base, folder / "tiny")
    write_jsonl(folder / "in.jsonl", queries())
    return folder


@pytest.fixture(scope="module")
def process(hub, place):
    """A Python program whose hub this is; what it prints is JSON."""

    def process(program, steps=(), endpoint=None):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | {
            "HF_ENDPOINT": endpoint or hub.url,
            "HF_HOME": str(place / "cache"),
            "HF_HUB_DISABLE_XET": "1",  # another protocol, of huggingface.co alone
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=json.dumps(steps), stdout=subprocess.PIPE, text=True, env=environment, cwd=place, check=True,
        )  # fmt: skip
        return json.loads(done.stdout)

    return process


@pytest.fixture(scope="module")
def done(hub, process, place, trained):
    """What became of a session's commands, and of the files on the hub."""
    own = shutil.copytree(trained.folder, place / "own")
    (own / "README.md").write_text("mine")
    (own / "decision.json").unlink()
    predict = ("--input", "in.jsonl", "--samples", "3")
    push = ("--to", "user/desk", "--base-model", "tiny")
    new = ("push", str(trained.folder), "--to", "user/new", "--base-model", "tiny")
    commands = {
        "push": (server.TOKEN, ["push", str(trained.folder), *push, "--private"]),
        "folder": ("", ["predict", str(trained.folder), *predict]),
        "hub": ("", ["predict", "hub:user/desk", *predict]),
        "again": (server.TOKEN, ["push", str(own), *push]),
        "update": (server.TOKEN, ["push", str(own), *push, "--update", "--revision", "next"]),
        "branch": ("", ["predict", "hub:user/desk@next", *predict]),
        "no branch": ("", ["predict", "hub:user/desk@none", *predict]),
        "no repository": ("", ["predict", "hub:user/none", *predict]),
        "no token": ("", list(new)),
        "wrong token": ("hf_wrong", list(new)),
        "wrong name": (server.TOKEN, ["push", str(trained.folder), "--to", "user/a/b", "--base-model", "tiny"]),
    }
    results = process(_COMMANDS, steps=[*commands.values()])
    return {name: SimpleNamespace(status=s, out=o, err=e) for name, (s, o, e) in zip(commands, results, strict=True)}


@pytest.fixture(scope="module")
def offline(done, process, trained):
    """What two commands do without a network: one that has all in the cache, and one that hasn't."""
    predict = ["predict", "hub:user/desk", "--input", "in.jsonl", "--samples", "3"]
    push = ["push", str(trained.folder), "--to", "user/new", "--base-model", "tiny"]
    return process(_COMMANDS, steps=[("", predict), (server.TOKEN, push)], endpoint="http://127.0.0.1:9")


@pytest.fixture(scope="module")
def found(hub, done, process):
    """What a server finds of a run, and `models` of a base model that has its configuration only."""
    hub.branches["user/plain"] = {}
    hub.commit("user/plain", "main", {"config.json": b'{"hidden_size": 48, "dtype": "bfloat16"}'})
    served, facts = process(_SERVED + _FACTS)
    return served, facts


def test_what_goes_up(hub, done, trained):
    assert done["push"].status == 0, done["push"].err
    assert done["push"].out.startswith(f"uploaded: {hub.url}/user/desk/commit/")
    assert "next: bloblora predict hub:user/desk --input FILE" in done["push"].out
    assert hub.private == {"user/desk": True}  # and nothing else was made
    files = hub.files("user/desk", "main")[1]
    assert sorted(files) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "blob_config.json",
        "decision.json",
        "metrics.json",
        "posterior.safetensors",
        "reliability-test.png",
        "run.json",
        "task.json",
    ]
    for name, content in files.items():
        assert str(trained.data.parent).encode() not in content, name
        assert b"where is my parcel" not in content, name
    for name in ("adapter_model.safetensors", "posterior.safetensors", "task.json"):
        assert files[name] == (trained.folder / name).read_bytes()
    assert json.loads(files["run.json"])["config"]["data"] == "private queries.jsonl"
    sources = [entry["data"] for entry in json.loads(files["metrics.json"])["evaluations"]]
    assert sources == ["private queries.jsonl", "support_desk:test"]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "tiny"
    assert "hub:user/desk" in files["README.md"].decode()


def test_what_comes_back(done, offline):
    assert done["hub"].status == 0, done["hub"].err
    assert done["hub"].out == done["folder"].out  # to the last digit
    assert "decision" in json.loads(done["hub"].out.splitlines()[0])
    status, out, err = offline[0]
    assert (status, out) == (0, done["hub"].out), err  # from the cache, without a network


def test_stock_peft_loads_the_mean(done, process, trained):
    mean = runs.load_run(trained.folder).predict([{"text": "where is my parcel"}], 0).probabilities[0]
    assert process(_STOCK) == pytest.approx(mean.tolist(), abs=1e-6)


def test_what_a_server_finds(found):
    metrics, diagrams = found[0]
    assert metrics == {name: {"accuracy": 0.25, "num_samples": 0.0} for name in ("desk", "next")}
    assert diagrams == ["reliability-test.png"]


def test_a_branch_and_a_text_of_one_s_own(hub, done):
    assert done["again"].status == 2
    assert "'user/desk' exists already; give another name, or `update` to commit to it" in done["again"].err
    assert done["update"].status == 0, done["update"].err
    assert "next: bloblora predict hub:user/desk@next" in done["update"].out
    main, branch = (hub.files("user/desk", name)[1]["README.md"] for name in ("main", "next"))
    assert b"Made by `bloblora card`" in main
    assert branch == b"mine"
    assert done["branch"].status == 0, done["branch"].err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no branch", "hub:user/desk@none: can't be fetched from http://127.0.0.1"),
        ("no repository", "hub:user/none: can't be fetched from http://127.0.0.1"),
        ("no token", "no token found"),
        ("wrong token", "Invalid user token"),
        ("wrong name", "Repo id must be"),
    ],
)
def test_errors_are_one_message(done, name, message):
    assert (done[name].status, done[name].out) == (2, "")
    assert done[name].err.count("error: ") == 1
    assert done[name].err.count("\n") == 1
    assert message in done[name].err


def test_without_a_network(offline):
    status, _, err = offline[1]
    assert status == 2
    assert "'user/new' on http://127.0.0.1:9: " in err


def test_errors_before_the_hub_is_asked(trained, tmp_path):
    with pytest.raises(runs.RunError, match="is on this machine only; give its hub id as base_model"):
        bloblora_hub.push(trained.folder, "user/desk")
    with pytest.raises(runs.RunError, match=r"no run\.json in it"):
        bloblora_hub.push(tmp_path, "user/desk")
    with pytest.raises(runs.RunError, match="is on the hub already"):
        bloblora_hub.push("hub:user/desk", "user/desk")


@pytest.mark.parametrize("method", ["ensemble", "full", "laplace-lora", "swag", "scalabl", "c-lora", "lora"])
def test_what_goes_up_of_other_methods_is_enough(base, trained, tmp_path, method):
    settings = dict(model=str(base), steps=4, batch_size=2, r=2, method=method)
    settings |= {"validation": 0.5, "temperature_scaling": True} if method == "lora" else {}
    run = runs.train(
        runs.RunConfig.of(data=str(trained.data), output=str(tmp_path / "run"), **settings), progress=False
    )
    (tmp_path / "staged").mkdir()
    stage(runs.open_run(tmp_path / "run"), tmp_path / "staged")
    shutil.rmtree(tmp_path / "run")
    loaded = runs.load_run(tmp_path / "staged")
    texts = [{"text": record["text"]} for record in queries()]
    assert torch.equal(loaded.predict(texts, 2).log_probs, run.predict(texts, 2).log_probs)
    for file in tmp_path.glob("staged/**/*.json"):
        assert method == "ensemble" or file.parent == tmp_path / "staged"
    assert method != "full" or str(base) not in (tmp_path / "staged" / "config.json").read_text()


@pytest.mark.parametrize("name", ["start_from", "prior_from", "imported"])
def test_where_a_run_came_from_does_not_go_up(name, trained, tmp_path):
    (tmp_path / "staged").mkdir()
    stage(runs.open_run(trained.folder), tmp_path / "staged")
    run = json.loads((tmp_path / "staged" / "run.json").read_text())
    place = run["training"] if name == "imported" else run["config"]
    place[name] = str(tmp_path / "before")
    write_signed(tmp_path / "staged" / "run.json", run)
    _make_public(tmp_path / "staged", "user/desk", "nobody/tiny")
    run = json.loads((tmp_path / "staged" / "run.json").read_text())
    assert (run["training"] if name == "imported" else run["config"])[name] == "before"
    assert not any(str(tmp_path).encode() in file.read_bytes() for file in (tmp_path / "staged").rglob("*.*"))


def test_a_base_models_configuration_is_asked_for_once(hub, found):
    assert found[1] == [48, True, 48]
    asked = [request.split("/") for request in hub.requests if "/user/plain" in request]
    assert [(way, end[-1]) for way, *end in asked] == [
        ("HEAD ", "config.json"),  # is it there
        ("GET ", "plain"),  # the newest state
        ("HEAD ", "config.json"),
        ("GET ", "config.json"),
    ]
