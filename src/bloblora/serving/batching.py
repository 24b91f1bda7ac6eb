"""Inputs of several requests in one forward: a queue, and the one thread that empties it."""

import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from math import ceil
from threading import Condition, Thread
from typing import Any


class QueueFullError(RuntimeError):
    """No room for a request's inputs.

    Attributes:
        retry_after: seconds until there should be, at least 1.
    """

    def __init__(self, waiting: int, limit: int, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__(f"{waiting} inputs wait, of at most {limit}; come again in {retry_after} s")


class Batcher:
    """Calls a function on what waits, in one thread, until it is closed.

    A batch is of the oldest input and those of the same key, in their order. It is taken when there are ``max_batch``
    of them, or when the oldest has waited ``max_wait_ms``.

    Args:
        answer: takes a key and some inputs, and returns as many answers; an error is every one's answer.
        max_batch: most inputs a call.
        max_wait_ms: how long an input waits for others, milliseconds.
        limit: most inputs that wait.
    """

    def __init__(
        self, answer: Callable[[Any, list[Any]], Sequence[Any]], max_batch: int, max_wait_ms: float, limit: int
    ) -> None:
        self._answer, self._max_batch, self._max_wait, self._limit = answer, max_batch, max_wait_ms / 1000, limit
        self._waiting: deque[_Input] = deque()
        self._changed = Condition()
        self._closed = False
        self._batch_seconds = 0.0
        self._thread = Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Inputs that wait."""
        return len(self._waiting)

    def submit(self, key: Hashable, inputs: Sequence[Any]) -> list[Future[Any]]:
        """Put inputs in the queue: all of them or none.

        Raises:
            QueueFullError: there is no room.
            RuntimeError: the batcher is closed.
        """
        added = [_Input(key, value) for value in inputs]
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            if len(self._waiting) + len(added) > self._limit:
                calls = len(self._waiting) / self._max_batch
                raise QueueFullError(len(self._waiting), self._limit, max(1, ceil(calls * self._batch_seconds)))
            self._waiting.extend(added)
            self._changed.notify()
        return [input_.answer for input_ in added]

    def close(self) -> None:
        """Answer what waits, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next():
            start = time.monotonic()
            try:
                answers = self._answer(batch[0].key, [input_.value for input_ in batch])
                for input_, answer in zip(batch, answers, strict=True):
                    input_.answer.set_result(answer)
            except Exception as error:
                for input_ in batch:
                    if not input_.answer.done():
                        input_.answer.set_exception(error)
            self._batch_seconds = time.monotonic() - start

    def _next(self) -> list["_Input"]:
        """The next batch; empty when the batcher is closed and nothing waits."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return []
                taken = self._take(self._waiting[0])
            # whoever asked may have gone
            if batch := [input_ for input_ in taken if input_.answer.set_running_or_notify_cancel()]:
                return batch

    def _take(self, first: "_Input") -> list["_Input"]:
        """Wait for others like the first, and take them out of the queue."""
        left = first.since + self._max_wait - time.monotonic()
        self._changed.wait_for(lambda: self._closed or len(self._alike(first)) == self._max_batch, left)
        batch = self._alike(first)
        taken = {id(input_) for input_ in batch}
        self._waiting = deque(input_ for input_ in self._waiting if id(input_) not in taken)
        return batch

    def _alike(self, first: "_Input") -> list["_Input"]:
        return [input_ for input_ in self._waiting if input_.key == first.key][: self._max_batch]


@dataclass
class _Input:
    key: Hashable
    value: Any
    since: float = field(default_factory=time.monotonic)
    answer: Future[Any] = field(default_factory=Future)
