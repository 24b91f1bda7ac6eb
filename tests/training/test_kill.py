"""A training that is killed at any moment goes on from its last complete checkpoint."""

import gc
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from bloblora import find_posterior, load
from bloblora.training import last_checkpoint

from .conftest import TASK, _base, _base_state, make_trainer

OPTIONS = dict(save_strategy="steps", save_steps=1, save_total_limit=1, logging_steps=1000, max_steps=100_000)


def train_until_killed(folder: Path) -> None:
    gc.freeze()  # as in tests/conftest.py
    make_trainer(folder, **OPTIONS).train(resume_from_checkpoint=last_checkpoint(folder) is not None)


@pytest.fixture(scope="module")
def forks():
    """Processes with the imports done, so that a kill costs no start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.test_kill"])
    return context


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.long)])
def test_killed_at_random_moments(tmp_path, forks, kills):
    moments, last = random.Random(kills), 0
    for _ in range(kills):
        process = forks.Process(target=train_until_killed, args=(tmp_path,))
        process.start()
        deadline = time.monotonic() + 120
        while _step(tmp_path) <= last:  # it has gone on, past the checkpoint that it started from
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.3))  # a step with its checkpoint takes about 40 to 150 ms
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        last = _step(tmp_path)

    base = _base()
    base.load_state_dict(_base_state())
    model = load(base, last_checkpoint(tmp_path))
    assert len(find_posterior(model).named_stds()) == 4
    trainer = make_trainer(tmp_path, **{**OPTIONS, "max_steps": last + 2})
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == last + 2
    assert [path.name for path in tmp_path.iterdir()] == [f"checkpoint-{last + 2}"]
    assert trainer.task is TASK


def _step(folder: Path) -> int:
    found = last_checkpoint(folder)
    return int(found.name.split("-")[1]) if found else 0
