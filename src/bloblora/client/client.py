r"""Predictions from draws that another program serves.

.. math:: \bar p(y \mid x) = \frac1S \sum_s p_s(y \mid x)

p_s comes from the log-probabilities that a server gives for draw s, by the run's own task: the token ids that are sent
are those that `bloblora.predict` reads.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

from .. import tasks
from ..data import unanswered
from ..export import TOKENIZER, read_manifest
from ..prediction import Prediction
from .server import CompletionServer, ServerError

_T = TypeVar("_T")


@dataclass(frozen=True)
class DrawTexts:
    """What each draw writes to each prompt.

    Attributes:
        texts: n lists of S.
        token_log_probs: of each text the log-probabilities of its tokens under its own draw, nats.
    """

    texts: list[list[str]]
    token_log_probs: list[list[list[float]]]


class DrawClient:
    """Asks for all draws of an export at once and averages.

    Args:
        directory: the export's folder, of which manifest.json and the tokenizer are read.
        base_url: of the server, up to and with ``/v1``; where a server has one adapter, one for each name.
        api_key: of the servers.
        top_logprobs: default, choices are scored by the log-probabilities of a prompt that has them (``echo``), for any
            task. A number reads the answer's letter among so many most probable next tokens instead: one request a
            draw, for ``choice_letter``; vLLM gives 20 unless it was started with ``--max-logprobs``.
        concurrency: requests at a time.
        timeout: seconds until an answer must be complete.
        retries: of a request that is answered with 429 or 503.

    Raises:
        RunError: there is no manifest.
        ValueError: ``base_url`` lacks a draw.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        base_url: str | Mapping[str, str],
        api_key: str | None = None,
        *,
        top_logprobs: int | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 5,
    ) -> None:
        self.manifest = read_manifest(directory)
        self.names = self.manifest.draws or [self.manifest.mean or ""]
        urls = dict.fromkeys(self.names, base_url) if isinstance(base_url, str) else dict(base_url)
        if missing := [name for name in self.names if name not in urls]:
            raise ValueError(f"base_url: no URL for {', '.join(missing)}; give one for each of {', '.join(self.names)}")
        servers = {url: CompletionServer(url, api_key, timeout, retries) for url in set(urls.values())}
        self._servers = {name: servers[urls[name]] for name in self.names}
        self._task = tasks.task_from_dict(self.manifest.task)
        folder = Path(directory)
        self._tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZER if (folder / TOKENIZER).is_dir() else folder)
        self._top_logprobs, self._concurrency = top_logprobs, concurrency

    def predict(self, records: Sequence[dict[str, Any]]) -> Prediction:
        """Probabilities of each record's choices under each draw, as `Run.predict` has them.

        Raises:
            TaskError: a record can't be the task's.
            ServerError: a server gave no usable answer.
            ValueError: the task has no choices, or ``top_logprobs`` doesn't fit it.
        """
        if not self._task.scored_by:
            raise ValueError(f"the run's task is {self._task.name}, which has no choices for a server to score")
        if self._top_logprobs is not None and "top_logprobs" not in self._task.scored_by:
            raise ValueError(f"task {self._task.name} can't be scored by top_logprobs; leave it out")
        examples = [self._task.continuations(example) for example in self._encode(records)]
        ask = self._echoed if self._top_logprobs is None else self._letters
        rows = self._map(lambda name, example: ask(name, *example), examples)
        padded = pad_sequence([row for draw in rows for row in draw], batch_first=True, padding_value=-math.inf)
        log_probs = padded.unflatten(0, (len(self.names), len(examples))).log_softmax(-1)
        return Prediction(log_probs, self.manifest.num_samples)

    def generate(self, records: Sequence[dict[str, Any]], max_new_tokens: int = 64, **options: Any) -> DrawTexts:
        """What each draw writes to each prompt, greedily unless ``options`` of the request say otherwise.

        Raises:
            TaskError: a record can't be the task's.
            ServerError: a server gave no usable answer.
            ValueError: the task isn't generation.
        """
        if self._task.kind != "generation":
            raise ValueError(f"the run's task is {self._task.name}, which writes no text")
        request = {"max_tokens": max_new_tokens, "temperature": 0.0, "logprobs": 1, **options}

        def write(name: str, example: dict[str, Any]) -> tuple[str, list[float]]:
            text, logprobs = self._servers[name].complete(name, example["prompt"], **request)
            return text, logprobs["token_logprobs"]

        draws = self._map(write, self._encode(records))
        by_record = [*zip(*draws, strict=True)]
        return DrawTexts([[t for t, _ in row] for row in by_record], [[p for _, p in row] for row in by_record])

    def _encode(self, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return tasks.encode_all(self._task, [unanswered(record) for record in records], self._tokenizer)

    def _map(self, ask: Callable[[str, Any], _T], examples: Sequence[Any]) -> list[list[_T]]:
        """What each draw says of each example, several at a time; the first error ends it."""
        pool = ThreadPoolExecutor(self._concurrency)
        try:
            futures = [[pool.submit(ask, name, example) for example in examples] for name in self.names]
            return [[future.result() for future in row] for row in futures]
        finally:
            pool.shutdown(cancel_futures=True)

    def _echoed(self, name: str, prefix: list[int], branches: list[list[int]], scored: list[int]) -> torch.Tensor:
        """Log-likelihood of each branch's last ``scored`` tokens, nats, per token where the task says so; (C,)."""
        scores = []
        for branch, count in zip(branches, scored, strict=True):
            ids = prefix + branch
            request = {"max_tokens": 1, "temperature": 0.0, "echo": True, "logprobs": 1}
            found = self._servers[name].complete(name, ids, **request)[1]["token_logprobs"]
            if len(found) not in (len(ids), len(ids) + 1):
                raise ServerError(
                    f"{self._servers[name].base_url}, model {name!r}: {len(found)} log-probabilities for a prompt of "
                    f"{len(ids)} tokens; the server must take token ids and 'echo' (vLLM does), or give top_logprobs"
                )
            total = sum(found[len(ids) - count : len(ids)])
            scores.append(self._task.choice_logit(total, count))
        return torch.tensor(scores)

    def _letters(self, name: str, prefix: list[int], branches: list[list[int]], scored: list[int]) -> torch.Tensor:
        """Log-probability of each branch's token as the next one, nats, (C,)."""
        request = {
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": self._top_logprobs,
            "return_tokens_as_token_ids": True,
        }
        top = self._servers[name].complete(name, prefix, **request)[1]["top_logprobs"][0]
        return torch.tensor([self._found(name, top, token) for (token,) in branches])

    def _found(self, name: str, top: Mapping[str, float], token: int) -> float:
        for key in (f"token_id:{token}", str(self._tokenizer.decode([token]))):
            if key in top:
                return top[key]
        raise ServerError(
            f"{self._servers[name].base_url}, model {name!r}: {self._tokenizer.decode([token])!r} isn't among the "
            f"{len(top)} most probable tokens that the server gave; give more top_logprobs, or leave it out"
        )
