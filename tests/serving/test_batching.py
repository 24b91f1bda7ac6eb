"""What shares a batch, without a model: a function that notes its calls."""

import time
from threading import Event

import pytest

from bloblora.serving import Batcher, QueueFullError


class Noted:
    """Answers an input with its square, and notes the calls; the first one waits to be let go."""

    def __init__(self):
        self.calls, self.started, self.go = [], Event(), Event()

    def __call__(self, key, inputs):
        self.calls.append((key, inputs))
        self.started.set()
        assert self.go.wait(10)
        if key == "bad":
            raise ZeroDivisionError
        return [value**2 for value in inputs]


@pytest.fixture
def held():
    """A batcher whose first call holds it up, while others are put in the queue."""
    noted = Noted()
    batcher = Batcher(noted, max_batch=3, max_wait_ms=0.0, limit=8)
    first = batcher.submit("first", [2])
    assert noted.started.wait(10)
    yield batcher, noted, first
    noted.go.set()
    batcher.close()


def test_a_batch_takes_what_waits_of_one_key_in_order(held):
    batcher, noted, first = held
    asked = [*batcher.submit("a", [1, 2]), *batcher.submit("b", [3]), *batcher.submit("a", [4, 5])]
    assert len(batcher) == 5
    noted.go.set()
    assert [future.result(10) for future in [*first, *asked]] == [4, 1, 4, 9, 16, 25]
    assert noted.calls == [("first", [2]), ("a", [1, 2, 4]), ("b", [3]), ("a", [5])]


def test_a_queue_takes_all_of_a_request_or_nothing(held):
    batcher, noted, _ = held
    batcher.submit("a", [1] * 6)
    with pytest.raises(QueueFullError, match="6 inputs wait, of at most 8") as error:
        batcher.submit("a", [1] * 3)
    assert error.value.retry_after >= 1
    assert len(batcher) == 6
    last = batcher.submit("a", [7, 8])
    noted.go.set()
    assert [future.result(10) for future in last] == [49, 64]


def test_whoever_has_gone_is_not_answered_and_errors_are(held):
    batcher, noted, _ = held
    gone, stays = batcher.submit("a", [1, 2])
    bad = batcher.submit("bad", [1])[0]
    assert gone.cancel()
    noted.go.set()
    assert stays.result(10) == 4
    assert isinstance(bad.exception(10), ZeroDivisionError)
    assert noted.calls[1:] == [("a", [2]), ("bad", [1])]


def test_whoever_has_gone_takes_no_place(held):
    batcher, noted, _ = held
    gone = batcher.submit("a", [1] * 8)
    assert all(future.cancel() for future in gone)
    assert len(batcher) == 0
    stays = batcher.submit("b", range(8))
    noted.go.set()
    assert [future.result(10) for future in stays] == [value**2 for value in range(8)]
    assert noted.calls[1:] == [("b", [0, 1, 2]), ("b", [3, 4, 5]), ("b", [6, 7])]


def test_gone_while_it_waits_for_others():
    noted = Noted()
    noted.go.set()
    batcher = Batcher(noted, max_batch=8, max_wait_ms=100.0, limit=8)
    gone = batcher.submit("a", [1])[0]
    time.sleep(0.02)
    assert gone.cancel()
    assert batcher.submit("a", [2])[0].result(10) == 4
    assert batcher.submit("a", [3])[0].result(10) == 9
    batcher.close()


def test_the_batch_in_progress_counts_in_when_to_come_again(held):
    """It is the first, has taken 0.4 s, and two more are to come."""
    batcher, _, _ = held
    batcher.submit("a", [1] * 6)
    time.sleep(0.4)
    with pytest.raises(QueueFullError, match=r"come again in [2-9] s"):
        batcher.submit("a", [1] * 3)


def test_closing_answers_what_waits(held):
    batcher, noted, _ = held
    asked = batcher.submit("a", range(7))
    noted.go.set()
    batcher.close()
    assert [future.result(0) for future in asked] == [value**2 for value in range(7)]
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit("a", [1])


def test_an_input_waits_for_others_no_longer_than_it_may():
    noted = Noted()
    noted.go.set()
    batcher = Batcher(noted, max_batch=2, max_wait_ms=60.0, limit=8)
    start = time.monotonic()
    batcher.submit("a", [1])[0].result(10)
    assert time.monotonic() - start >= 0.06
    batcher.close()


def test_a_full_batch_is_not_waited_for():
    noted = Noted()
    noted.go.set()
    batcher = Batcher(noted, max_batch=2, max_wait_ms=60_000.0, limit=8)
    first = batcher.submit("a", [1])[0]
    batcher.submit("a", [2])
    assert first.result(10) == 1
    batcher.close()
    assert noted.calls == [("a", [1, 2])]
