"""The HTTP interface: predictions, models, health, metrics and the page."""

import asyncio
import reprlib
from base64 import b64encode
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from anyio import to_thread
from fastapi import Body, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from jinja2 import Environment
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from ..tasks import TaskError
from .hosted import Hosted, Settings
from .schema import (
    EXAMPLES,
    Answer,
    AnyBody,
    Failure,
    Metrics,
    Model,
    Models,
    PredictRequest,
    PredictResponse,
    Problem,
    Status,
)
from .server import DOCS_FILES, Access, Batcher, QueueFullError

_DESCRIPTION = "Answers of Bayesian LoRAs with their uncertainty: probabilities averaged over weight samples."
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": Failure, "description": "no JSON"},
    401: {"model": Failure, "description": "no valid API key"},
    408: {"model": Failure, "description": "the body took too long"},
    413: {"model": Failure, "description": "the body is too large"},
    421: {"model": Failure, "description": "the Host header has a name that isn't the server's"},
    422: {"model": Failure, "description": "fields that can't be used"},
    429: {"model": Failure, "description": "the queue is full; Retry-After says when to come again"},
}

_MAX_PROBLEMS = 20
_CHARACTERS_A_TOKEN = 16  # three to four times those of prose in any language: what has more isn't tokenized
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2


class InputsError(HTTPException):
    """A request that can't be answered; `problems` says what of it, by field, for the first of them."""

    def __init__(self, *problems: Problem, more: int = 0) -> None:
        self.problems = problems[:_MAX_PROBLEMS]
        fields = [*dict.fromkeys(problem.field for problem in self.problems)]
        more += len(problems) - len(self.problems)
        super().__init__(422, f"can't be used: {', '.join(fields)}" + (f", and {more} problems more" if more else ""))


def create_app(
    hosted: Mapping[str, Hosted], settings: Settings, keys: Sequence[str] = (), allowed_hosts: Sequence[str] = ()
) -> FastAPI:
    """The application, which ends its model thread when the server stops.

    With ``keys`` a request must bring one. Without, its Host header must be an IP address, ``localhost`` or one of
    ``allowed_hosts``, where ``*`` is any.
    """

    def answer(key: tuple[str, int], inputs: list[Any]) -> list[dict[str, Any]]:
        name, num_samples = key
        answers = hosted[name].answer(inputs, num_samples, settings)
        metrics.batch(name, len(answers), sum(answer["num_draws"] for answer in answers))
        return answers

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await to_thread.run_sync(batcher.close)

    batcher = Batcher(answer, settings.batch_size, settings.max_wait_ms, settings.queue)
    metrics = Metrics(batcher.__len__)
    about: dict[str, Any] = {
        "title": settings.title or "bloblora",
        "description": settings.description or _DESCRIPTION,
        "version": version("bloblora"),
    }
    # FastAPI's own /docs loads its script from a CDN, and asks another server whether the schema is valid.
    pages: dict[str, Any] = {
        "redoc_url": None,
        "favicon_url": "data:,",
        "swagger_ui_parameters": {"validatorUrl": None},
    }
    app = FastAPIOffline(**about, **pages, static_url=DOCS_FILES, lifespan=lifespan)
    app.state.stopping, app.state.batcher, app.state.read_seconds = False, batcher, settings.read_seconds
    guards = [Depends(HTTPBearer(auto_error=False))] if keys else []  # for the schema: `Access` decides
    _add_predict(app, hosted, settings, guards)
    _add_models(app, hosted, settings, guards)
    _add_status(app, metrics)
    _add_page(app, settings)
    _add_errors(app)
    app.add_middleware(
        Access,
        keys=keys,
        hosts=allowed_hosts,
        max_body_bytes=settings.max_body_bytes,
        read_seconds=settings.read_seconds,
    )
    app.add_middleware(metrics.counted)
    return app


def _add_predict(app: FastAPI, hosted: Mapping[str, Hosted], settings: Settings, guards: list[Any]) -> None:
    @app.post(
        "/v1/predict", responses=_ERRORS, operation_id="predict", dependencies=guards, response_model_exclude_none=True
    )
    async def predict(body: Annotated[AnyBody, Body(openapi_examples=EXAMPLES)]) -> PredictResponse:
        """Answer inputs; those of requests that come together share forward passes, which changes no answer."""
        name, num_samples, inputs = await to_thread.run_sync(_read, body, hosted, settings)
        futures = app.state.batcher.submit((name, num_samples), inputs)
        answers = await asyncio.gather(*map(asyncio.wrap_future, futures))
        return PredictResponse(model=name, samples=num_samples, answers=[Answer(**answer) for answer in answers])


def _add_models(app: FastAPI, hosted: Mapping[str, Hosted], settings: Settings, guards: list[Any]) -> None:
    models = Models(models=[_model(run, settings) for run in hosted.values()])

    @app.get("/v1/models", responses={401: _ERRORS[401]}, operation_id="models", dependencies=guards)
    async def list_models() -> Models:
        """The runs that are served."""
        return models

    @app.get("/v1/models/{name}/reliability.png", include_in_schema=False)
    async def diagram(name: str) -> FileResponse:
        """A run's reliability diagram, as `bloblora evaluate --diagram` made it."""
        if name not in hosted or not hosted[name].diagram.is_file():
            raise HTTPException(404, f"there is no diagram of a run {_SHORT.repr(name)}")
        return FileResponse(hosted[name].diagram, media_type="image/png")


def _add_status(app: FastAPI, metrics: Metrics) -> None:
    @app.get("/health", operation_id="health")
    async def health() -> Status:
        """The process lives."""
        return Status(status="ok")

    @app.get("/ready", operation_id="ready", responses={503: {"model": Status, "description": "it is stopping"}})
    async def ready(response: Response) -> Status:
        """Whether requests are taken: until the server is told to stop."""
        response.status_code = 503 if app.state.stopping else 200
        return Status(status="stopping" if app.state.stopping else "ready")

    @app.get("/metrics", response_class=Response, include_in_schema=False)
    async def read_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")


def _add_page(app: FastAPI, settings: Settings) -> None:
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True).from_string(template).render(settings=settings)
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = b64encode(sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def read_page() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)


def _add_errors(app: FastAPI) -> None:
    def failed(status: int, message: str, headers: Mapping[str, str] | None = None, *problems: Problem) -> JSONResponse:
        return JSONResponse(Failure(message=message, problems=[*problems]).model_dump(), status, headers)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return failed(error.status_code, str(error.detail), error.headers, *getattr(error, "problems", ()))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:  # there is no JSON
        return await refused(request, InputsError(*(_problem("body", None, part["msg"]) for part in error.errors())))

    @app.exception_handler(QueueFullError)
    async def full(_: Request, error: QueueFullError) -> JSONResponse:
        return failed(429, str(error), {"Retry-After": str(error.retry_after)})

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        # uvicorn, which gets the error too, closes the connection: a client must not send its next request on it.
        return failed(500, f"{type(error).__name__} on the server, whose log says more", {"Connection": "close"})


def _read(body: Any, hosted: Mapping[str, Hosted], settings: Settings) -> tuple[str, int, list[tuple[Any, Any]]]:
    """The run that a request is for, its N, and each record with its encoding; an InputsError if it can't be used."""
    try:
        request = PredictRequest.model_validate(body, context=settings)
    except ValidationError as error:
        parts = error.errors(include_url=False)
        problems = [_problem(_field(part["loc"]), part["input"], part["msg"]) for part in parts[:_MAX_PROBLEMS]]
        raise InputsError(*problems, more=len(parts) - len(problems)) from error
    name = next(iter(hosted)) if request.model is None and len(hosted) == 1 else request.model
    if (run := hosted.get(name or "")) is None:
        raise InputsError(_problem("model", name, f"must be one of {', '.join(hosted)}"))
    num_samples = settings.samples if request.samples is None else request.samples
    if num_samples > settings.max_samples:
        raise InputsError(_problem("samples", num_samples, f"must be at most {settings.max_samples}"))
    given = request.inputs if isinstance(request.inputs, list) else [request.inputs]
    records = [{"text": one} if isinstance(one, str) else one.model_dump(exclude_none=True) for one in given]
    return run.name, num_samples, _encoded(run, records, settings)


def _encoded(run: Hosted, records: Sequence[dict[str, Any]], settings: Settings) -> list[tuple[Any, Any]]:
    """Each record with its encoding; an InputsError where some can't be used or are too long."""
    problems, encoded = [], []
    wanted = {"text": "'text'", "choice": "'question' and 'choices'"}[run.kind]
    most = settings.max_tokens * _CHARACTERS_A_TOKEN
    for number, record in enumerate(records):
        field = f"inputs[{number}]"
        characters = sum(len("".join(value)) for value in record.values())  # of a text or of choices
        if ("text" in record) != (run.kind == "text"):
            problems.append(_problem(field, record, f"the run {run.name!r} needs {wanted}"))
            continue
        if characters > most:
            limit = f"must be at most {most} characters, {_CHARACTERS_A_TOKEN} for each of {settings.max_tokens} tokens"
            problems.append(_problem(field, f"{characters} characters", limit))
            continue
        try:
            example = run.encode(record)
        except TaskError as error:
            problems += [_problem(field, record, problem) for problem in error.problems]
            continue
        tokens = run.run.task.length(example) + example["truncated"]
        if tokens > settings.max_tokens:
            problems.append(_problem(field, f"{tokens} tokens", f"must be at most {settings.max_tokens} tokens"))
        encoded.append((record, example))
    if problems:
        raise InputsError(*problems)
    return encoded


def _model(hosted: Hosted, settings: Settings) -> Model:
    run = hosted.run
    return Model(
        name=hosted.name,
        purpose=hosted.purpose,
        method=run.method.name,
        base_model=run.config.model,
        task=run.task.name,
        kind=hosted.kind,  # type: ignore[arg-type]
        labels=list(run.task.labels) if run.task.labels else None,
        samples=settings.samples,
        deterministic=run.method.deterministic,
        temperature=run.scales.get("temperature"),
        width=run.scales.get("width"),
        promises=hosted.decision.promises if hosted.decision else None,
        detection=hosted.detection,
        warnings=run.training.get("warnings", []),
        examples=hosted.examples,  # type: ignore[arg-type]
        metrics=hosted.metrics,
        diagram=hosted.diagram.is_file(),
        adapter_sha256=run.adapter_sha256,
        shared_parameters=hosted.shared_parameters,
    )


def _problem(field: str, value: Any, message: str) -> Problem:
    shown = _SHORT.repr(value)  # which also escapes halves of surrogate pairs
    return Problem(field=field, value=shown if len(shown) <= 80 else f"{shown[:79]}…", message=message)


def _field(place: Sequence[Any]) -> str:
    """``inputs[0].text`` of a place in the body, without the schema's tags of alternatives."""
    parts = [part for part in place if not str(part).startswith("<")]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part[:80]}" for part in parts).lstrip(".") or "body"
