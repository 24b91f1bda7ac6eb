"""A disk that is full while something is written: the message says so, and names the file or folder."""

import resource
from contextlib import contextmanager

import pytest
import torch

from bloblora.files import as_os_error
from tests.training.conftest import make_trainer


@contextmanager
def at_most(size):
    """A file that grows beyond it is an error of the system, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_torch_does_not_say(tmp_path):
    file = tmp_path / "weights.pt"
    said = r"weights\.pt: can't be written: File too large$"
    with at_most(1 << 16), pytest.raises(OSError, match=said), as_os_error(file):
        torch.save(torch.zeros(1 << 16), file)


@pytest.mark.parametrize("size", [2000, 8000], ids=["its text", "its tensors"])
def test_a_checkpoint_that_finds_no_room(tmp_path, size):
    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    with at_most(size), pytest.raises(OSError, match="File too large") as caught:
        trainer.train()
    assert str(tmp_path / "checkpoint-1") in str(caught.value)
    assert not (tmp_path / "checkpoint-1").exists()
