"""Two processes as the shipped accelerate configuration starts them, against one with the same batches."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from bloblora import runs
from bloblora.cli import main
from bloblora.runs.processes import CHUNK
from tests.tiny_base import queries, save_base, write_jsonl

from .launched import ROOT, everything, launch, settings

CONFIG = "examples/accelerate/ddp_cpu.yaml"
LONG = [{"id": i, "text": f"where is {'my ' * (i % 5)}parcel"} for i in range(2 * CHUNK + 100)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_thread):
    folder = tmp_path_factory.mktemp("processes")
    save_base(folder / "base")
    write_jsonl(folder / "texts.jsonl", queries() * 4)
    write_jsonl(folder / "long.jsonl", LONG)
    write_jsonl(folder / "validation.jsonl", [{**r, "text": r["text"] + " again"} for r in queries()[::-1] * 2])
    data = ("--data", f"{folder}/texts.jsonl", "--model", f"{folder}/base")
    main(["train", *data, *settings(), "--output", f"{folder}/trained"])
    launch(CONFIG, "tests.runs.launched", str(folder), "two")
    everything(folder, "one")
    return folder


@pytest.mark.parametrize("method", ["lora", "blob", "head"])
def test_the_posterior_is_that_of_one_process(folder, method):
    names = ("adapter_model.safetensors", "posterior.safetensors")[: 1 if method == "lora" else 2]
    for name in names:
        one, two = (load_file(folder / f"{method}-{suffix}" / name) for suffix in ("one", "two"))
        fresh = load_file(folder / "trained" / name)
        shared = one.keys() & fresh.keys()
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-5)
        if method != "head":  # `trained` is one
            assert not shared or not all(torch.allclose(one[key], fresh[key], atol=1e-3) for key in shared)


@pytest.mark.parametrize("method", ["lora", "blob", "head"])
def test_one_process_writes_and_the_run_is_whole(folder, method):
    one, two = (folder / f"{method}-{suffix}" for suffix in ("one", "two"))
    assert {file.name for file in two.iterdir()} == {file.name for file in one.iterdir()}
    training = [json.loads((path / "run.json").read_text())["training"] for path in (one, two)]
    assert [step for step, _ in training[0]["curve"]] == [step for step, _ in training[1]["curve"]]
    assert training[1]["final"]["nll"] == pytest.approx(training[0]["final"]["nll"], rel=1e-4)
    assert runs.load_run(two).training["num_examples"] == 16


def test_validation_is_that_of_one_process(folder):
    """The eight records are gathered as four batches of two processes' pairs: no part batch, so the NLL is exact."""
    one, two = (
        json.loads((folder / f"validated-{suffix}" / "run.json").read_text())["training"]["validation"]
        for suffix in ("one", "two")
    )
    (one,), (two,) = one["trainings"], two["trainings"]
    assert (two["best_step"], two["stopped_early"]) == (one["best_step"], one["stopped_early"])
    for there, here in zip(one["curve"], two["curve"], strict=True):
        assert here == pytest.approx(there, rel=1e-4)
    load = [load_file(folder / f"validated-{suffix}" / "adapter_model.safetensors") for suffix in ("one", "two")]
    for key in load[0]:
        torch.testing.assert_close(load[1][key], load[0][key], rtol=1e-4, atol=1e-5)


def test_shared_predictions_are_those_of_one_process(folder):
    lines = (folder / "two.jsonl").read_text(encoding="utf-8")
    assert lines == (folder / "one.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["id"] for line in lines.splitlines()] == list(range(len(LONG)))
    assert not [*folder.glob(".*.jsonl*")]


def test_the_commands_of_the_documentation(folder, monkeypatch):
    """Those that are launched, in one process and with a smaller model; tests/docs runs the others."""
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- not run: .*-->\n```sh\n(.*)\n```", text)
    commands = [command for command in map(str.split, blocks) if "fsdp" not in " ".join(command)]
    assert [command[:4] for command in commands if "train" in command] == [
        ["accelerate", "launch", "--config_file", CONFIG]
    ]
    monkeypatch.chdir(folder)
    write_jsonl(folder / "queries.jsonl", queries())
    write_jsonl(folder / "new_queries.jsonl", queries())
    main(["train", "--data", "queries.jsonl", "--output", "runs/big", "--model", "base", *settings()])
    for command in commands:
        arguments = command[command.index("bloblora") + 1 :]
        if arguments[0] == "train":
            arguments += ["--model", "base", *settings()]
        main(arguments)
