"""What is wrong with a request, field by field."""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from ..tasks import TaskError
from .hosted import Hosted, Settings
from .schema import Problem

_MAX_PROBLEMS = 20
_CHARACTERS_A_TOKEN = 16  # three to four times those of prose in any language: what has more isn't tokenized
SHORT = reprlib.Repr()
SHORT.maxlevel = 2
Request = TypeVar("Request", bound=BaseModel)


class InputsError(HTTPException):
    """A request that can't be answered; `problems` says what of it, by field, for the first of them."""

    def __init__(self, *problems: Problem, more: int = 0, status: int = 422, code: str | None = None) -> None:
        self.problems, self.code = problems[:_MAX_PROBLEMS], code
        fields = [*dict.fromkeys(problem.field for problem in self.problems)]
        more += len(problems) - len(self.problems)
        super().__init__(
            status, f"can't be used: {', '.join(fields)}" + (f", and {more} problems more" if more else "")
        )


def validated(kind: type[Request], body: Any, settings: Settings) -> Request:
    """The request that a body is; an InputsError where it is none."""
    if isinstance(body, bytes):  # FastAPI has left it so
        raise InputsError(problem_of("body", body, "send it with the header 'Content-Type: application/json'"))
    try:
        return kind.model_validate(body, context=settings)
    except ValidationError as error:
        parts = error.errors(include_url=False)
        problems = [problem_of(_field(part["loc"]), part["input"], _said(part, kind)) for part in parts[:_MAX_PROBLEMS]]
        raise InputsError(*problems, more=len(parts) - len(problems)) from error


def find_run(name: str | None, hosted: Mapping[str, Hosted], status: int = 422) -> Hosted:
    """The run that a request is for, which needs no name where there is one; an InputsError where there is none."""
    if name is None and len(hosted) == 1:
        return next(iter(hosted.values()))
    if (run := hosted.get(name or "")) is None:
        raise InputsError(problem_of("model", name, f"must be one of {', '.join(hosted) or 'none'}"), status=status)
    return run


def samples_of(given: int | None, settings: Settings) -> int:
    """N of a request; an InputsError where it is above the limit."""
    num_samples = settings.samples if given is None else given
    if num_samples > settings.max_samples:
        raise InputsError(problem_of("samples", num_samples, f"must be at most {settings.max_samples}"))
    return num_samples


def encoded(run: Hosted, record: dict[str, Any], field: str, characters: int, settings: Settings) -> Any:
    """A record's encoding; an InputsError where it can't be used or is too long."""
    long = "context_length_exceeded"
    if characters > settings.max_tokens * _CHARACTERS_A_TOKEN:
        most = settings.max_tokens * _CHARACTERS_A_TOKEN
        limit = f"must be at most {most} characters, {_CHARACTERS_A_TOKEN} for each of {settings.max_tokens} tokens"
        raise InputsError(problem_of(field, f"{characters} characters", limit), code=long)
    try:
        example = run.encode(record)
    except TaskError as error:
        raise InputsError(*(problem_of(field, record, problem) for problem in error.problems)) from error
    tokens = run.run.task.length(example) + example["truncated"]
    if tokens > settings.max_tokens:
        limit = f"must be at most {settings.max_tokens} tokens"
        raise InputsError(problem_of(field, f"{tokens} tokens", limit), code=long)
    return example


def problem_of(field: str, value: Any, message: str) -> Problem:
    """A problem, whose value is shortened."""
    shown = SHORT.repr(value)  # which also escapes halves of surrogate pairs
    return Problem(field=field, value=shown if len(shown) <= 80 else f"{shown[:79]}…", message=message)


def _said(part: Any, kind: type[BaseModel]) -> str:
    """Pydantic's message; of an unknown field of a request those that there are."""
    if part["type"] != "extra_forbidden":
        return str(part["msg"])
    return "is no field" + (f"; the fields are {', '.join(kind.model_fields)}" if len(part["loc"]) == 1 else "")


def _field(place: Sequence[Any]) -> str:
    """``inputs[0].text`` of a place in the body, without the schema's tags of alternatives."""
    parts = [part for part in place if not str(part).startswith("<")]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part[:80]}" for part in parts).lstrip(".") or "body"
