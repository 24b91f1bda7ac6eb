"""Two gloo processes under torchrun, against one with the same global batch."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .conftest import assert_close, assert_equal
from .scenarios import LOGGED, QUIET, STYLES, by_class_means, quiet

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tests.training.scenarios"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, "-m", *run, str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize(("style", "sampling"), QUIET)
def test_two_processes_equal_one_with_their_batches_joined(tmp_path, ranks, style, sampling):
    expected = quiet(tmp_path, style, sampling, batch=8)
    results = [rank["quiet", style, sampling] for rank in ranks]
    assert_equal(results[1]["weights"], results[0]["weights"])
    assert_close(results[0]["weights"], expected["weights"], rtol=1e-4, atol=1e-6)
    for key in LOGGED:  # the loss and the NLL are means over both: each process writes the same
        assert results[0]["logs"][key] == results[1]["logs"][key]
        assert results[0]["logs"][key] == pytest.approx(expected["logs"][key], rel=1e-4), key


def test_class_means_are_those_of_the_records_of_both(tmp_path, ranks):
    expected, (a, b) = by_class_means(tmp_path, batch=8), (rank["class means"] for rank in ranks)
    assert_equal(a["weights"], b["weights"])
    assert_close(a["weights"], expected["weights"], rtol=1e-3, atol=1e-5)
    assert a["nll"] == b["nll"] == pytest.approx(expected["nll"], rel=1e-4)


@pytest.mark.parametrize("style", STYLES)
def test_each_process_has_its_own_noise_and_all_have_the_same_weights(ranks, style):
    a, b = (rank["noisy", style] for rank in ranks)
    assert_equal(a["weights"], b["weights"])
    assert len(a["seen"]) == len(b["seen"]) == 10  # five steps of two draws
    # The first forward's A x of the same four texts by the same weights: only the noise differs. Its mean over texts
    # and processes estimates M x; independent noise of n entries correlates by 1/√n.
    first, second = a["seen"][0], b["seen"][0]
    mean = torch.cat([first, second]).mean(0)
    x, y = (first - mean).mean(1).flatten(), (second - mean).mean(1).flatten()
    assert x.std() > 0.1 * mean.abs().mean()
    assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1]) < 4 / math.sqrt(len(x))


@pytest.mark.parametrize("style", ["joint", "paper_flow"])
def test_all_have_the_same_weights_where_the_kl_is_an_estimate(ranks, style):
    a, b = (rank["estimated KL", style] for rank in ranks)
    assert_equal(a["weights"], b["weights"])


@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
def test_two_processes_resume_in_the_middle_of_the_second_pass(ranks, sampling):
    for rank in ranks:
        assert_equal(rank["resumed", sampling]["resumed"], rank["resumed", sampling]["weights"])
    assert_equal(ranks[1]["resumed", sampling]["resumed"], ranks[0]["resumed", sampling]["resumed"])
