"""A training whose last checkpoint was damaged goes on from the one before, and says so."""

import hashlib
import json
import re
import shutil

import pytest
import torch

from bloblora.cli import main
from bloblora.training.checkpoints import KEPT, TRAINER_STATE_NAME
from tests.tiny_base import write_signed

STEPS = ("--steps", "3", "--save-steps", "1", "--save-total-limit", "3", "--keep-checkpoints", "--batch-size", "2")


@pytest.fixture(scope="module")
def stopped(files, tmp_path_factory):
    """A run with its three checkpoints, that was stopped before it was saved."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    main(["train", "--data", files.texts, "--model", files.base, "--output", str(folder), *STEPS])
    content = json.loads((folder / "run.json").read_text())
    write_signed(folder / "run.json", {k: v for k, v in content.items() if k not in ("training", "files")})
    return folder


@pytest.fixture
def go_on(call, files, stopped, tmp_path):
    """Damage the last checkpoint and give the command again: status, standard error, and whether weights are equal."""

    def go_on(damage):
        run = tmp_path / "run"
        shutil.copytree(stopped, run)
        damage(run / "checkpoints" / "checkpoint-3")
        (run / "adapter_model.safetensors").unlink()
        status, _, err = call("train", "--data", files.texts, "--model", files.base, "--output", run, *STEPS)
        weights = run / "adapter_model.safetensors"
        equal = weights.is_file() and weights.read_bytes() == (stopped / weights.name).read_bytes()
        return status, err, equal

    return go_on


def _flip(name):
    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return damage


def _other_optimizer(folder):
    torch.save({}, folder / "optimizer.pt")


def _older_scheduler(folder):
    shutil.copy(folder.parent / "checkpoint-1" / "scheduler.pt", folder)


def _no_generator(folder):
    (folder / "rng_state.pth").unlink()


def _nested_state(folder):
    (folder / TRAINER_STATE_NAME).write_text("[" * 100_000)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (_flip("optimizer.pt"), r"the SHA-256 of optimizer\.pt isn't the one in trainer_state\.json"),
        (_flip("adapter_model.safetensors"), "adapter_model.safetensors"),
        (_other_optimizer, r"the SHA-256 of optimizer\.pt"),
        (_older_scheduler, r"the SHA-256 of scheduler\.pt"),
        (_no_generator, r"rng_state\*\.pth is missing"),
        (_nested_state, "nested in more than 64 levels"),
    ],
    ids=["optimizer", "weights", "other optimizer", "older scheduler", "no generator", "state"],
)
def test_the_one_before_is_taken(go_on, damage, problem):
    status, err, equal = go_on(damage)
    assert (status, equal) == (0, True), err
    assert "checkpoint-3: passed over, for a training can't go on from it: " in err
    assert re.search(problem, err)


def test_what_is_hashed(stopped):
    """No file that a callback writes after the Trainer's state, such as seconds.json."""
    folder = stopped / "checkpoints" / "checkpoint-3"
    found = json.loads((folder / TRAINER_STATE_NAME).read_text())["stateful_callbacks"][KEPT]["sha256"]
    weights = {"adapter_model.safetensors", "posterior.safetensors", "class_means.safetensors"}
    assert found.keys() == weights | {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}
    assert found["optimizer.pt"] == hashlib.sha256((folder / "optimizer.pt").read_bytes()).hexdigest()


@pytest.mark.parametrize("content", ["", '{"seconds": 1', "[]", '{"seconds": "x"}', '{"seconds": NaN}'])
def test_a_clock_that_cannot_be_read_costs_its_seconds_alone(go_on, content):
    status, err, equal = go_on(lambda folder: (folder / "seconds.json").write_text(content))
    assert (status, equal) == (0, True), err
    assert "passed over" not in err


def test_another_trainings_optimizer_without_hashes(go_on):
    """As a training with another Trainer leaves it."""

    def damage(folder):
        _other_optimizer(folder)
        state = json.loads((folder / TRAINER_STATE_NAME).read_text())
        del state["stateful_callbacks"][KEPT]["sha256"]
        (folder / TRAINER_STATE_NAME).write_text(json.dumps(state))

    status, err, _ = go_on(damage)
    assert status == 2
    assert "checkpoint-3: its optimizer or scheduler can't be restored: KeyError" in err.splitlines()[-1]


def test_without_any_checkpoint_that_is_whole(go_on):
    """The damaged one has the highest step, for which the Trainer would delete the new ones."""

    def damage(folder):
        for older in (1, 2):
            shutil.rmtree(folder.with_name(f"checkpoint-{older}"))
        _no_generator(folder)

    status, err, equal = go_on(damage)
    assert (status, equal) == (0, True), err
