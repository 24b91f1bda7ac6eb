r"""The draws of an export, asked of an OpenAI-compatible server and averaged here; needs ``bloblora[client]``.

.. math:: \bar p(y \mid x) = \frac1S \sum_s p_s(y \mid x)

p_s comes from the log-probabilities that a server gives for draw s, by the run's own task: the token ids that are sent
are those that `bloblora.predict` reads. PyTorch and Transformers are imported when a `DrawClient` is made.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .checks import is_key
from .messages import quoted

try:
    import httpx
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("bloblora.client needs httpx: pip install 'bloblora[client]'") from error

if TYPE_CHECKING:
    from .prediction import Prediction

_BUSY = (429, 503)
_LONGEST_WAIT = 60.0
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
            task; or where the adapters have a part on the output head, which vLLM leaves out there (its issue 51594),
            token by token, each as the only one that may come next (``allowed_token_ids``). A number reads the answer's
            letter among so many most probable next tokens instead: one request a draw, for ``choice_letter``; vLLM
            gives 20 unless it was started with ``--max-logprobs``.
        concurrency: requests at a time.
        timeout: seconds until an answer must be complete.
        retries: of a request that is answered with 429 or 503.
        trust_remote_code: run the Python code that the tokenizer comes with, where it needs some.

    Raises:
        RunError: there is no manifest, or it or the tokenizer was altered.
        ModelError: the tokenizer can't be loaded.
        ValueError: ``base_url`` lacks a draw or is no URL, ``api_key`` is none that an HTTP header can carry, or
            ``concurrency`` or ``retries`` is out of range.
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
        trust_remote_code: bool = False,
    ) -> None:
        from .export import TOKENIZER, read_manifest
        from .models import read_tokenizer
        from .tasks import task_from_dict

        if concurrency < 1:
            raise ValueError(f"concurrency must be 1 or more, got {concurrency}")
        self.manifest = read_manifest(directory, check_files=f"{TOKENIZER}*")
        self.names = self.manifest.draws or [self.manifest.mean or ""]
        urls = dict.fromkeys(self.names, base_url) if isinstance(base_url, str) else dict(base_url)
        if missing := [name for name in self.names if name not in urls]:
            raise ValueError(f"base_url: no URL for {', '.join(missing)}; give one for each of {', '.join(self.names)}")
        servers = {url: CompletionServer(url, api_key, timeout, retries) for url in set(urls.values())}
        self._servers = {name: servers[urls[name]] for name in self.names}
        self._task = task_from_dict(self.manifest.task)
        folder = Path(directory)
        folder = folder / TOKENIZER if (folder / TOKENIZER).is_dir() else folder
        self._tokenizer = read_tokenizer(folder, trust_remote_code=trust_remote_code)
        self._top_logprobs, self._concurrency = top_logprobs, concurrency

    def predict(self, records: Any) -> Prediction:
        """Probabilities of each record's choices under each draw, as `Run.predict` has them.

        ``records`` are what `bloblora.data.as_records` takes, as there.

        Raises:
            DataError: the records aren't those of a task.
            TaskError: a record can't be the task's.
            ServerError: a server gave no usable answer.
            ValueError: the task has no choices, ``top_logprobs`` doesn't fit it, or there are no records.
        """
        if not self._task.scored_by:
            raise ValueError(f"the run's task is {self._task.name}, which has no choices for a server to score")
        if self._top_logprobs is not None and "top_logprobs" not in self._task.scored_by:
            raise ValueError(f"task {self._task.name} can't be scored by top_logprobs; leave it out")
        import torch
        from torch.nn.utils.rnn import pad_sequence

        from .prediction.kinds import Prediction

        examples = [self._task.continuations(example) for example in self._encode(records)]
        if not examples:
            raise ValueError("records: there is nothing to predict")
        echoed = self._forced if self.manifest.on_head else self._echoed
        ask = echoed if self._top_logprobs is None else self._letters
        draws = self._map(lambda name, example: self._checked(name, ask(name, *example)), examples)
        flat = [torch.tensor(row) for rows in draws for row in rows]
        padded = pad_sequence(flat, batch_first=True, padding_value=-math.inf)
        logits = padded.unflatten(0, (len(self.names), len(examples)))
        log_probs = (logits / self.manifest.temperature).log_softmax(-1)
        return Prediction(log_probs, self.manifest.num_samples)

    def generate(self, records: Any, max_new_tokens: int = 64, **options: Any) -> DrawTexts:
        """What each draw writes to each prompt, greedily unless ``options`` of the request say otherwise.

        ``records`` are what `bloblora.data.as_records` takes; a text alone is a prompt. One that leaves no room for
        ``max_new_tokens`` loses its beginning, as in `Run.generate`.

        Raises:
            DataError: the records aren't those of a task.
            TaskError: a record can't be the task's.
            ServerError: a server gave no usable answer.
            ValueError: the task isn't generation, ``max_new_tokens`` is below 1 or leaves no room for a prompt, or an
                option is one that is given here.
        """
        if self._task.kind != "generation":
            raise ValueError(f"the run's task is {self._task.name}, which writes no text")
        if given := sorted({"model", "prompt", "max_tokens", "n", "stream"} & options.keys()):
            raise ValueError(
                f"options: {', '.join(given)} can't be among them; each draw writes max_new_tokens at most"
            )
        limit = self._tokenizer.model_max_length
        if not 1 <= max_new_tokens < limit:
            raise ValueError(f"max_new_tokens must be from 1 to below {limit}, got {max_new_tokens}")
        request = {"max_tokens": max_new_tokens, "logprobs": 1, **options}
        examples = self._encode(records, limit - max_new_tokens + 1)  # of which the task leaves one for the answer
        draws = self._map(lambda name, example: self._ask(name, example["prompt"], **request), examples)
        by_record = [*zip(*draws, strict=True)]
        token_log_probs = [[logprobs["token_logprobs"] for _, logprobs in row] for row in by_record]
        for row in token_log_probs:
            for name, values in zip(self.names, row, strict=True):
                if any(map(math.isnan, values)):
                    raise ServerError(f"{self._servers[name].base_url}, model {name!r}: a log-probability is NaN")
        return DrawTexts([[text for text, _ in row] for row in by_record], token_log_probs)

    def _encode(self, source: Any, longest: int | None = None) -> list[dict[str, Any]]:
        from .data import Known, as_records, unanswered
        from .tasks import encode_all

        records = as_records(source, known=Known(kind=self._task.kind))
        task = self._task
        if longest is not None and (task.max_length or math.inf) > longest:
            task = replace(task, max_length=longest)
        return encode_all(task, [unanswered(record) for record in records], self._tokenizer)

    def _checked(self, name: str, scores: list[float]) -> list[float]:
        """Log-probabilities of a record's choices; a ServerError where they are no distribution."""
        if max(scores) == -math.inf or not all(score < math.inf for score in scores):
            raise ServerError(
                f"{self._servers[name].base_url}, model {name!r}: the log-probabilities of a record's choices are "
                f"{scores}; they must be numbers below infinity, and one of them above -inf. Look at the model that "
                "the server loaded, and at its precision: float16 may overflow"
            )
        return scores

    def _ask(self, name: str, prompt: list[int], **options: Any) -> tuple[str, dict[str, Any]]:
        return self._servers[name].complete(name, prompt, **{"max_tokens": 1, "temperature": 0.0, **options})

    def _map(self, ask: Callable[[str, Any], _T], examples: Sequence[Any]) -> list[list[_T]]:
        """What each draw says of each example, several at a time; the first error ends it."""
        pool = ThreadPoolExecutor(self._concurrency)
        try:
            futures = [[pool.submit(ask, name, example) for example in examples] for name in self.names]
            return [[future.result() for future in row] for row in futures]
        finally:
            pool.shutdown(cancel_futures=True)

    def _echoed(self, name: str, prefix: list[int], branches: list[list[int]], scored: list[int]) -> list[float]:
        """Log-likelihood of each branch's last ``scored`` tokens, nats, per token where the task says so; (C,)."""
        scores = []
        for branch, count in zip(branches, scored, strict=True):
            ids = prefix + branch
            found = self._ask(name, ids, echo=True, logprobs=1)[1]["token_logprobs"]
            if len(found) not in (len(ids), len(ids) + 1):
                raise ServerError(
                    f"{self._servers[name].base_url}, model {name!r}: {len(found)} log-probabilities for a prompt of "
                    f"{len(ids)} tokens; the server must take token ids and 'echo' (vLLM does), or give top_logprobs"
                )
            scores.append(self._task.choice_logit(sum(found[len(ids) - count : len(ids)]), count))
        return scores

    def _letters(self, name: str, prefix: list[int], branches: list[list[int]], scored: list[int]) -> list[float]:
        """Log-probability of each branch's token as the next one, nats, (C,)."""
        advice = "give more top_logprobs, or leave it out"
        return self._next(name, prefix, [token for (token,) in branches], advice, logprobs=self._top_logprobs)

    def _forced(self, name: str, prefix: list[int], branches: list[list[int]], scored: list[int]) -> list[float]:
        """As `_echoed`, of tokens that the server writes because no others are allowed."""
        scores = []
        for branch, count in zip(branches, scored, strict=True):
            ids, total = prefix + branch, 0.0
            for place in range(len(ids) - count, len(ids)):
                only = {"allowed_token_ids": [ids[place]], "logprobs": 1}
                advice = "it must take allowed_token_ids (vLLM does); or export with --format merged"
                total += self._next(name, ids[:place], [ids[place]], advice, **only)[0]
            scores.append(self._task.choice_logit(total, count))
        if not any(scores):
            raise ServerError(
                f"{self._servers[name].base_url}, model {name!r}: gives log-probabilities among the allowed tokens; "
                "start vLLM with --logprobs-mode raw_logprobs, its default"
            )
        return scores

    def _next(self, name: str, prompt: list[int], tokens: list[int], advice: str, **options: Any) -> list[float]:
        """Log-probability of each of the tokens as the next one, nats."""
        _, logprobs = self._ask(name, prompt, return_tokens_as_token_ids=True, **options)
        top = (logprobs.get("top_logprobs") or [None])[0] or {}
        found = []
        for token in tokens:
            text = str(self._tokenizer.decode([token]))
            score = top.get(f"token_id:{token}", top.get(text))
            if score is None:
                raise ServerError(
                    f"{self._servers[name].base_url}, model {name!r}: {quoted(text)} isn't among the {len(top)} most "
                    f"probable tokens that the server gave; {advice}"
                )
            found.append(score)
        return found


class ServerError(RuntimeError):
    """A server gave no usable answer; the message says which one, to what, and what would be right."""


class CompletionServer:
    """A server's ``/completions``, by its URL up to and with ``/v1``; threads may share it.

    After 429 or 503 a request is sent again, when ``Retry-After`` says or after 1, 2, 4 … s, up to ``retries`` times.
    """

    def __init__(self, base_url: str, api_key: str | None, timeout: float, retries: int) -> None:
        if retries < 0:
            raise ValueError(f"retries must be 0 or more, got {retries}")
        self.base_url, self.timeout, self.retries = base_url.rstrip("/"), timeout, retries
        api_key = (api_key or "").strip()
        if not is_key(api_key):  # no message quotes it
            raise ValueError("api_key: has characters other than visible ASCII")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=None)  # how many at once is the client's to say
        try:
            self._client = httpx.Client(base_url=self.base_url, headers=headers, timeout=timeout, limits=limits)
        except httpx.InvalidURL as error:
            raise ValueError(
                f"base_url: {quoted(base_url)} is no URL ({error}); it must be like http://localhost:8000/v1"
            ) from error

    def complete(self, model: str, prompt: list[int], **options: Any) -> tuple[str, dict[str, Any]]:
        """A completion of token ids by the adapter ``model``; ``logprobs`` must be among the options.

        Returns:
            The text; and ``token_logprobs``, nats, with ``echo`` those of the prompt before the new ones, and
            ``top_logprobs``.

        Raises:
            ServerError: no connection, no answer in time, an error, or an answer without log-probabilities.
        """
        response = self._post({"model": model, "prompt": prompt, **options})
        try:
            (choice,) = response.json()["choices"]
            text, logprobs = choice["text"], choice.get("logprobs") or {}
            if logprobs.get("content") is not None:
                logprobs = _as_completion(logprobs["content"])
            _check_completion(text, logprobs, bool(options.get("echo")))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ServerError(f"{self.base_url}, model {model!r}: not a completion: {response.text[:200]}") from error
        if not logprobs.get("token_logprobs"):
            raise ServerError(
                f"{self.base_url}, model {model!r}: the answer has no log-probabilities although 'logprobs' was asked "
                "for; use a server that gives them with /v1/completions, such as vLLM"
            )
        return text, logprobs

    def _post(self, body: dict[str, Any]) -> httpx.Response:
        what = f"{self.base_url}, model {body['model']!r}"
        for attempt in range(self.retries + 1):
            try:
                response = self._client.post("/completions", json=body)
            except httpx.TimeoutException as error:
                raise ServerError(f"{what}: no answer in {self.timeout:g} s; give a longer timeout") from error
            except httpx.HTTPError as error:
                raise ServerError(f"{what}: {error}; is the server up, and does base_url end in /v1?") from error
            if response.status_code not in _BUSY or attempt == self.retries:
                break
            time.sleep(_wait(response, attempt))
        if response.is_success:
            return response
        reason = f"{what}: status {response.status_code}: {response.text[:500]}"
        if response.status_code == 404:
            reason += "; serve each draw by its name in manifest.json, whose 'commands' say how"
        if response.status_code in _BUSY:
            reason += f"; still so after {self.retries} retries: lower concurrency"
        raise ServerError(reason)


def _as_completion(content: list[dict[str, Any]]) -> dict[str, Any]:
    """Log-probabilities in the form of chats, which llama.cpp gives here too, in the form of completions."""
    tops = [{f"token_id:{top['id']}": top["logprob"] for top in token["top_logprobs"]} for token in content]
    return {"token_logprobs": [token["logprob"] for token in content], "top_logprobs": tops}


def _check_completion(text: Any, logprobs: dict[str, Any], echo: bool) -> None:
    """Raise what Python raises of another type, or a ValueError; of an echoed prompt the first token has no number."""
    numbers = [*(logprobs.get("token_logprobs") or ())][echo:]
    numbers += [score for top in logprobs.get("top_logprobs") or () if top is not None for score in top.values()]
    if not isinstance(text, str) or not all(isinstance(number, int | float) for number in numbers):
        raise ValueError("a text and numbers are needed")


def _wait(response: httpx.Response, attempt: int) -> float:
    """Seconds until the next try."""
    asked = math.nan
    with suppress(KeyError, ValueError):  # it may be a date
        asked = float(response.headers["Retry-After"])
    return min(2.0**attempt if math.isnan(asked) else max(asked, 0.0), _LONGEST_WAIT)
