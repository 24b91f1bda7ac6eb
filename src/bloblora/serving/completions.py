"""OpenAI's completions and chat completions, of runs that write text: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from operator import eq
from threading import Event
from typing import Any
from uuid import uuid4

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from ..generation.asking import question_length
from ..generation.options import LEAST_TEMPERATURE
from ..messages import shortened
from ..runs.texts import WritingOptions
from .hosted import Hosted, Settings
from .problems import InputsError, encoded, find_run, problem_of, samples_of, validated
from .schema import OPENAI_PATHS, ChatRequest, CompletionRequest, Problem, event, failure
from .server import Batcher, unless_gone
from .writing import Token, Way, Writing, first_stop


@dataclass(frozen=True)
class Asked:
    """A request for answers in text.

    Attributes:
        run: that writes.
        how: it writes.
        examples: the encoded prompts.
        stop: texts before which answers end.
        top: how many of the most probable tokens are named at each place.
        chat: whether they are chats.
        logprobs: whether log-probabilities are asked for.
        stream: whether the answers are sent while they are written.
        usage: whether a stream's last event counts tokens.
    """

    run: Hosted
    how: Way
    examples: list[dict[str, Any]]
    stop: tuple[str, ...]
    top: int
    chat: bool
    logprobs: bool
    stream: bool
    usage: bool


def read_completion(body: Any, hosted: Mapping[str, Hosted], settings: Settings, chat: bool) -> Asked:
    """What a body asks for; an InputsError where it can't be answered."""
    request: Any = validated(ChatRequest if chat else CompletionRequest, body, settings)
    writers = {name: run for name, run in hosted.items() if run.kind == "prompt"}
    if request.model in hosted and request.model not in writers:
        raise InputsError(problem_of("model", request.model, "writes no text; ask it at /v1/predict"), status=404)
    run = find_run(request.model, writers, status=404)
    name = "max_completion_tokens" if chat and request.max_completion_tokens else "max_tokens"
    new_tokens = getattr(request, name) or settings.new_tokens
    if new_tokens > settings.max_new_tokens:
        raise InputsError(problem_of(name, new_tokens, f"must be at most {settings.max_new_tokens}"))
    if chat and request.max_tokens and request.max_tokens != new_tokens:
        advice = f"must be max_completion_tokens, {new_tokens}, or left out"
        raise InputsError(problem_of("max_tokens", request.max_tokens, advice))
    for name in ("temperature", "answer_temperature"):
        if 0 < (value := getattr(request, name) or 0) < LEAST_TEMPERATURE:
            raise InputsError(problem_of(name, value, f"must be at least {LEAST_TEMPERATURE} where it isn't 0"))
    needed = _NEEDED if body.get("top_p") == 1 else {**_NEEDED, "top_p": ("temperature",)}
    if problems := _without_effect(body, needed):
        raise InputsError(*problems)
    answers = request.answers or 0
    if answers > settings.max_answers:
        raise InputsError(problem_of("answers", answers, f"must be at most {settings.max_answers}"))
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    top = (request.top_logprobs if chat else request.logprobs) or 0
    how = Way(
        run.name,
        samples_of(request.samples, settings),
        settings.seed if request.seed is None else request.seed,
        WritingOptions(
            max_new_tokens=new_tokens,
            temperature=request.temperature or 0.0,
            top_p=1.0 if request.top_p is None else request.top_p,
            decoding=request.decoding or WritingOptions.decoding,
            answers=answers,
            answer_temperature=request.answer_temperature or 1.0,
            agree=request.agree or WritingOptions.agree,
            p_true=bool(request.p_true),
        ),
        bool(request.draws),
    )
    if run.rules_for(how) is None and (problems := _without_effect(body, {"agree": ("answers", "draws")})):
        raise InputsError(*problems)  # with rules for this way of writing it chooses among them
    logprobs = bool(request.logprobs) if chat else request.logprobs is not None
    examples = [_fitting(run, record, place, how, settings) for place, record in _records(request, chat)]
    usage = bool(request.stream_options and request.stream_options.include_usage)
    return Asked(run, how, examples, stop, top, chat, logprobs, bool(request.stream), usage)


_NEEDED = {"top_logprobs": ("logprobs",), "stream_options": ("stream",), "answer_temperature": ("answers",)}


def _without_effect(body: Mapping[str, Any], needed: Mapping[str, tuple[str, ...]]) -> list[Problem]:
    """Of each option that does nothing without one of those that it ``needed``."""
    return [
        problem_of(name, body[name], f"has no effect without {' or '.join(others)}")
        for name, others in needed.items()
        if body.get(name) and not any(map(body.get, others))
    ]


async def answered(asked: Asked, request: Request, writer: Batcher) -> Response:
    """The answers, whole or as a stream; a client that goes away ends them."""
    answers = _Answers(asked, writer)
    if asked.stream:
        return _Stream(asked, answers)
    try:
        return JSONResponse(await unless_gone(request, _whole(asked, answers)))
    finally:
        answers.leave()


def _records(request: Any, chat: bool) -> list[tuple[str, dict[str, Any]]]:
    """The prompts as records, and the field of each."""
    if not chat:
        if isinstance(request.prompt, str):
            return [("prompt", {"prompt": request.prompt})]
        return [(f"prompt[{number}]", {"prompt": text}) for number, text in enumerate(request.prompt)]
    if request.messages[-1].role == "assistant":
        last = f"messages[{len(request.messages) - 1}].role"
        raise InputsError(problem_of(last, "assistant", "the last message must be one that it answers"))
    messages = []
    for message in request.messages:
        parts = [message.content] if isinstance(message.content, str) else [part.text for part in message.content]
        role = "system" if message.role == "developer" else message.role  # which templates know
        messages.append({"role": role, "content": "".join(parts)})
    return [("messages", {"messages": messages})]


def _fitting(run: Hosted, record: dict[str, Any], place: str, how: Way, settings: Settings) -> dict[str, Any]:
    """A record's encoding, whose answer has room after it, by the limits of `Run.generate`, which would cut it."""
    texts = [record["prompt"]] if "prompt" in record else [message["content"] for message in record["messages"]]
    example = encoded(run, record, place, sum(map(len, texts)), settings)
    task, tokenizer, long = run.run.task, run.run.tokenizer, "context_length_exceeded"
    tokens = task.length(example) + example["truncated"]
    if example["truncated"]:
        limit = f"must be at most {task.length(example)}: the run was trained with max_length {task.max_length}"
        raise InputsError(problem_of(place, f"{tokens} tokens", limit), code=long)
    more = how.writing.max_new_tokens + (question_length(tokenizer) if how.writing.p_true else 0)
    if tokens + more > (most := tokenizer.model_max_length):
        question = " and of the question whether it is true" if how.writing.p_true else ""
        limit = f"with {more} more of the answer{question} must be at most {most}, which the model reads"
        raise InputsError(problem_of(place, f"{tokens} tokens", limit), code=long)
    return example


@dataclass(frozen=True)
class _Piece:
    """A token's part of an answer.

    Attributes:
        token: what is known of it.
        place: how many tokens precede it.
        text: its own.
        start: where it starts in the answer, in characters.
        end: where it ends, which is its start where it adds nothing to the answer, as a special token.
    """

    token: Token
    place: int
    text: str
    start: int
    end: int


@dataclass
class _Text:
    """An answer as it grows, of which no part of a stop is shown."""

    tokenizer: Any
    stop: Sequence[str]
    ids: list[int] = field(default_factory=list)
    text: str = ""
    shown: int = 0
    start: int = 0
    held: list[_Piece] = field(default_factory=list)

    def add(self, token: Token) -> None:
        """One more token."""
        before = self.text
        self.ids.append(token.id)
        self.text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not (self.text == before and before.endswith("\N{REPLACEMENT CHARACTER}")):  # else bytes of one character
            self.start = len([*takewhile(bool, map(eq, before, self.text))])
        text = self.tokenizer.decode([token.id])
        self.held.append(_Piece(token, len(self.ids) - 1, text, self.start, len(self.text)))

    def take(self, finish_reason: str | None) -> tuple[str, list[_Piece]]:
        """What can be shown that wasn't, with its tokens: nothing while a character or a stop may be incomplete.

        ``finish_reason`` is None while the answer is written. The token that ends it is no part of it.
        """
        end, last = first_stop(self.text, self.stop), self.held[-1:]
        silent = bool(last) and last[0].start == last[0].end
        if finish_reason is None:
            begun = (stop[:length] for stop in self.stop for length in range(1, min(len(stop), len(self.text) + 1)))
            if silent or self.text.endswith("\N{REPLACEMENT CHARACTER}") or any(map(self.text.endswith, begun)):
                return "", []
        elif silent and finish_reason == "stop":
            self.held.pop()
        new, self.shown = self.text[self.shown : end], end
        tokens, self.held = [one for one in self.held if one.start < end or one.end <= end], []
        return new, tokens


class _Answers:
    """The answers to one request while they are written: pieces of text with tokens, and how each ended."""

    def __init__(self, asked: Asked, writer: Batcher) -> None:
        loop, self._queue, self._gone = asyncio.get_running_loop(), asyncio.Queue[Any](), Event()

        def send(index: int, item: Any) -> None:
            loop.call_soon_threadsafe(self._queue.put_nowait, (index, item))

        examples = [*enumerate(asked.examples)]
        writings = [
            Writing(example, partial(send, index), self._gone, asked.stop, asked.top) for index, example in examples
        ]
        self._texts = [_Text(asked.run.run.tokenizer, asked.stop) for _ in examples]
        self._futures = writer.submit(asked.how, writings)
        for index, future in enumerate(self._futures):
            future.add_done_callback(partial(send, index))

    async def __aiter__(self) -> AsyncIterator[tuple[int, str, list[Any], dict[str, Any] | None]]:
        left = len(self._futures)
        while left:
            index, item = await self._queue.get()
            text, end = self._texts[index], None
            if isinstance(item, Future):
                end, left = item.result(), left - 1
            else:
                text.add(item)
            new, tokens = text.take(None if end is None else end["finish_reason"])
            if tokens or end is not None:
                yield index, new, tokens, end

    def leave(self) -> None:
        """Nobody waits any more."""
        self._gone.set()
        for future in self._futures:
            future.cancel()

    @property
    def num_tokens(self) -> int:
        """Tokens that were written."""
        return sum(len(text.ids) for text in self._texts)


class _Stream(StreamingResponse):
    """Server-sent events of answers, for which nobody waits once it has ended in any way."""

    def __init__(self, asked: Asked, answers: _Answers) -> None:
        super().__init__(_events(asked, answers), media_type="text/event-stream")
        self._leave = answers.leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()


async def _whole(asked: Asked, answers: _Answers) -> dict[str, Any]:
    texts: list[Any] = [["", [], {}] for _ in asked.examples]
    async for index, new, tokens, end in answers:
        texts[index][0] += new
        texts[index][1] += tokens
        texts[index][2] = end
    choices = [_choice(asked, index, *parts) for index, parts in enumerate(texts)]
    return {**_head(asked), "choices": choices, "usage": _usage(asked, answers)}


async def _events(asked: Asked, answers: _Answers) -> AsyncIterator[str]:
    """The lines of a stream; what goes wrong on the way is its last event."""
    head = _head(asked)
    nothing: dict[str, Any] = {"usage": None} if asked.usage else {}
    try:
        if asked.chat:
            start = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            yield event({**head, "choices": [start], **nothing})
        async for index, new, tokens, end in answers:
            yield event({**head, "choices": [_choice(asked, index, new, tokens, end)], **nothing})
        if asked.usage:
            yield event({**head, "choices": [], "usage": _usage(asked, answers)})
        yield "data: [DONE]\n\n"
    except Exception as error:
        message = f"{type(error).__name__} on the server, whose log says more: {shortened(str(error))}"
        yield event(failure(OPENAI_PATHS[0], 500, message))
        raise


def _head(asked: Asked) -> dict[str, Any]:
    kind = ("chat.completion.chunk" if asked.stream else "chat.completion") if asked.chat else "text_completion"
    prefix = "chatcmpl" if asked.chat else "cmpl"
    return {"id": f"{prefix}-{uuid4().hex}", "object": kind, "created": int(time.time()), "model": asked.run.name}


def _usage(asked: Asked, answers: _Answers) -> dict[str, int]:
    prompt, answer = sum(len(example["prompt"]) for example in asked.examples), answers.num_tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _choice(
    asked: Asked, index: int, text: str, tokens: Sequence[_Piece], end: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A choice of the answer or of an event: OpenAI's fields, then our own."""
    content: dict[str, Any] = {"text": text}
    if asked.chat and asked.stream:
        content = {"delta": {"content": text} if text else {}}
    elif asked.chat:
        content = {"message": {"role": "assistant", "content": text, "refusal": None}}
    ended: dict[str, Any] = {"finish_reason": None} if end is None else dict(end)
    own = {
        "texts": [one.text for one in tokens],
        "log_probabilities": [one.token.log_probability for one in tokens],
        "mutual_information": [one.token.mutual_information for one in tokens],
    }
    if not asked.stream:
        own |= {name: [values[one.place] for one in tokens] for name, values in ended.pop("read").items()}
    logprobs = _logprobs(asked, tokens) if asked.logprobs else None
    return {"index": index, **content, "logprobs": logprobs, **ended, "tokens": own}


def _logprobs(asked: Asked, tokens: Sequence[_Piece]) -> dict[str, Any]:
    """Log-probabilities as OpenAI's two endpoints have them."""
    tokenizer = asked.run.run.tokenizer

    def text_of(token: int) -> str:
        return str(tokenizer.decode([token]))

    def by_text(top: Sequence[tuple[int, float]]) -> dict[str, float]:
        found: dict[str, float] = {}
        for token, value in top:
            found.setdefault(text_of(token), value)  # of those that have one text the most probable
        return found

    if not asked.chat:
        return {
            "tokens": [one.text for one in tokens],
            "token_logprobs": [one.token.log_probability for one in tokens],
            "top_logprobs": [by_text(one.token.top) for one in tokens],
            "text_offset": [one.start for one in tokens],
        }

    def entry(text: str, value: float) -> dict[str, Any]:
        part = "\N{REPLACEMENT CHARACTER}" in text  # of a character, whose bytes the text isn't
        return {"token": text, "logprob": value, "bytes": None if part else [*text.encode()]}

    content = [
        entry(one.text, one.token.log_probability)
        | {"top_logprobs": [entry(text_of(i), value) for i, value in one.token.top]}
        for one in tokens
    ]
    return {"content": content, "refusal": None}
