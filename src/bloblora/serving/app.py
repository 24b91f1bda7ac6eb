"""The HTTP interface: predictions, models, health, metrics and the page."""

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from hashlib import sha256
from importlib.metadata import version
from json import JSONDecodeError
from pathlib import Path
from typing import Annotated, Any

from anyio import to_thread
from fastapi import Body, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from jinja2 import Environment
from starlette.exceptions import HTTPException

from ..runs.folder import RUN_FILE, is_deterministic
from ..runs.texts import WritingOptions
from .completions import answered, read_completion
from .hosted import Hosted, Settings
from .problems import SHORT, InputsError, encoded, find_run, problem_of, samples_of, validated
from .schema import (
    EXAMPLES,
    INPUTS,
    OPENAI_PATHS,
    AnyBody,
    AnyChat,
    AnyCompletion,
    Failure,
    Metrics,
    Model,
    Models,
    OpenAIFailure,
    PredictRequest,
    PredictResponse,
    Status,
    Writer,
    answer_of,
    failure,
)
from .server import DOCS_FILES, Access, Batcher, QueueFullError, ended, unless_gone
from .writing import Way, Writing, write

_DESCRIPTION = "Answers of Bayesian LoRAs with their uncertainty: probabilities averaged over weight samples."
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": Failure, "description": "no JSON"},
    401: {"model": Failure, "description": "no valid API key"},
    408: {"model": Failure, "description": "the body took too long"},
    413: {"model": Failure, "description": "the body is too large"},
    421: {"model": Failure, "description": "the Host header has a name that isn't the server's"},
    422: {"model": Failure, "description": "fields that can't be used"},
    429: {"model": Failure, "description": "the queue is full; Retry-After says when to come again"},
    503: {"model": Failure, "description": "the server has stopped before the answer was complete"},
}
_OPENAI_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {**error, "model": OpenAIFailure} for status, error in _ERRORS.items() if status != 422
} | {
    400: {"model": OpenAIFailure, "description": "no JSON, or fields that can't be used"},
    404: {"model": OpenAIFailure, "description": "no such run, or one that writes no text"},
    "default": {"model": OpenAIFailure, "description": "something else went wrong"},
}
_TEXT = {
    200: {
        "description": "the answer, whole; with `stream` in server-sent events of its parts, as OpenAI's API has them",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
    }
}


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

    def write_texts(how: Way, answers: list[Writing]) -> list[dict[str, Any]]:
        ends = write(hosted[how.name].run, how, answers, hosted[how.name].rules_for(how))
        metrics.batch(how.name, len(ends), sum(end.pop("num_draws") for end in ends))
        return ends

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await to_thread.run_sync(batcher.close)
        await to_thread.run_sync(writer.close)

    # Labels need not wait for texts, which take longer.
    limits = (settings.batch_size, settings.max_wait_ms, settings.queue)
    batcher, writer = Batcher(answer, *limits), Batcher(write_texts, *limits)
    metrics = Metrics(lambda: len(batcher) + len(writer))
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
    app.state.writer = writer
    guards = [Depends(HTTPBearer(auto_error=False))] if keys else []  # for the schema: `Access` decides
    _add_predict(app, hosted, settings, guards)
    _add_completions(app, hosted, settings, guards)
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
    app.add_middleware(ended)
    app.add_middleware(metrics.counted)
    return app


def _add_predict(app: FastAPI, hosted: Mapping[str, Hosted], settings: Settings, guards: list[Any]) -> None:
    @app.post(
        "/v1/predict", responses=_ERRORS, operation_id="predict", dependencies=guards, response_model_exclude_none=True
    )
    async def predict(body: Annotated[AnyBody, Body(openapi_examples=EXAMPLES)], request: Request) -> PredictResponse:
        """Answer inputs; those of requests that come together share forward passes, which changes no answer."""
        name, num_samples, inputs = await to_thread.run_sync(_read, body, hosted, settings)
        futures = app.state.batcher.submit((name, num_samples), inputs)
        answers = await unless_gone(request, asyncio.gather(*map(asyncio.wrap_future, futures)))
        return PredictResponse(model=name, samples=num_samples, answers=[*map(answer_of, answers)])


def _add_completions(app: FastAPI, hosted: Mapping[str, Hosted], settings: Settings, guards: list[Any]) -> None:
    options: dict[str, Any] = {
        "responses": {**_TEXT, **_OPENAI_ERRORS},
        "dependencies": guards,
        "response_class": Response,
    }

    @app.post(OPENAI_PATHS[0], operation_id="complete", **options)
    async def complete(body: Annotated[AnyCompletion, Body()], request: Request) -> Response:
        """Continue prompts, as OpenAI's completions do; choices have `tokens`, `p_correct` and `abstain` besides.

        The last two only where the request's options, `answers` among them, are those that the map and the rules were
        made with.
        """
        asked = await to_thread.run_sync(read_completion, body, hosted, settings, False)
        return await answered(asked, request, app.state.writer)

    @app.post(OPENAI_PATHS[1], operation_id="chat", **options)
    async def chat(body: Annotated[AnyChat, Body()], request: Request) -> Response:
        """Answer a chat, as OpenAI's chat completions do; likewise."""
        asked = await to_thread.run_sync(read_completion, body, hosted, settings, True)
        return await answered(asked, request, app.state.writer)


def _add_models(app: FastAPI, hosted: Mapping[str, Hosted], settings: Settings, guards: list[Any]) -> None:
    writers = {run.name: _writer(run) for run in hosted.values() if run.kind == "prompt"}
    models = Models(models=[_model(run, settings) for run in hosted.values()], object="list", data=[*writers.values()])

    @app.get("/v1/models", responses={401: _ERRORS[401]}, operation_id="models", dependencies=guards)
    async def list_models() -> Models:
        """The runs that are served."""
        return models

    @app.get("/v1/models/{name}", include_in_schema=False, dependencies=guards)
    async def find_model(name: str) -> Writer:
        if name not in writers:
            raise HTTPException(404, f"there is no run {SHORT.repr(name)} that writes text")
        return writers[name]

    @app.get("/v1/models/{name}/reliability.png", include_in_schema=False)
    async def diagram(name: str) -> FileResponse:
        """A run's reliability diagram, as `bloblora evaluate --diagram` made it."""
        if name not in hosted or not hosted[name].diagram.is_file():
            raise HTTPException(404, f"there is no diagram of a run {SHORT.repr(name)}")
        return FileResponse(hosted[name].diagram, media_type="image/png")


def _add_status(app: FastAPI, metrics: Metrics) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health", operation_id="health")
    async def health() -> Status:
        """The process lives."""
        return Status(status="ok")

    @app.head("/ready", include_in_schema=False)
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
    def failed(
        request: Request, status: int, message: str, headers: Mapping[str, str] | None = None, **details: Any
    ) -> JSONResponse:
        path = request.url.path
        status = 400 if status == 422 and path in OPENAI_PATHS else status
        return JSONResponse(failure(path, status, message, **details), status, headers)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        details = {"problems": error.problems, "code": error.code} if isinstance(error, InputsError) else {}
        message = str(error.detail)
        if error.status_code == 400 and isinstance(cause := error.__cause__, ValueError | RecursionError):
            message = f"the body isn't JSON that can be read: {cause}"  # FastAPI leaves out why
        return failed(request, error.status_code, message, error.headers, **details)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:  # there is no JSON
        if isinstance(cause := error.__cause__, JSONDecodeError):
            problem = problem_of("body", cause.doc[cause.pos :], f"isn't JSON: {cause}")
            return await refused(request, InputsError(problem))
        return await refused(request, InputsError(*(problem_of("body", None, part["msg"]) for part in error.errors())))

    @app.exception_handler(QueueFullError)
    async def full(request: Request, error: QueueFullError) -> JSONResponse:
        return failed(request, 429, str(error), {"Retry-After": str(error.retry_after)})

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        # uvicorn, which gets the error too, closes the connection: a client must not send its next request on it.
        return failed(
            request, 500, f"{type(error).__name__} on the server, whose log says more", {"Connection": "close"}
        )


def _read(body: Any, hosted: Mapping[str, Hosted], settings: Settings) -> tuple[str, int, list[tuple[Any, Any]]]:
    """The run that a request is for, its N, and each record with its encoding; an InputsError if it can't be used."""
    request = validated(PredictRequest, body, settings)
    run = find_run(request.model, hosted)
    if run.kind == "prompt":
        raise InputsError(problem_of("model", run.name, "writes text; ask it at /v1/completions"))
    num_samples = samples_of(request.samples, settings)
    given = request.inputs if isinstance(request.inputs, list) else [request.inputs]
    records = [{"text": one} if isinstance(one, str) else one.model_dump(exclude_none=True) for one in given]
    return run.name, num_samples, _encoded(run, records, settings)


def _encoded(run: Hosted, records: Sequence[dict[str, Any]], settings: Settings) -> list[tuple[Any, Any]]:
    """Each record with its encoding; an InputsError where some can't be used or are too long."""
    problems, found = [], []
    needed = [name for name, field in INPUTS[run.kind].model_fields.items() if field.is_required()]
    for number, record in enumerate(records):
        field = f"inputs[{number}]"
        characters = sum(len("".join(value)) for value in record.values())  # of a text or of choices
        if needed[-1] not in record:
            wanted = " and ".join(map(repr, needed))
            problems.append(problem_of(field, record, f"the run {run.name!r} needs {wanted}"))
            continue
        try:
            found.append((record, encoded(run, record, field, characters, settings)))
        except InputsError as error:
            problems += error.problems
    if problems:
        raise InputsError(*problems)
    return found


def _writer(hosted: Hosted) -> Writer:
    trained = (hosted.folder / RUN_FILE).stat().st_mtime
    return Writer(id=hosted.name, object="model", created=int(trained), owned_by="bloblora")


def _promises(hosted: Hosted, settings: Settings) -> dict[str, str] | None:
    """Of the calibrated decisions for a request that asks for nothing else."""
    decision = hosted.decision
    if hosted.kind == "prompt":
        usual = Way(hosted.name, settings.samples, settings.seed, WritingOptions(max_new_tokens=settings.new_tokens))
        rules = hosted.rules_for(usual)
        decision = rules.decision if rules else None
    return decision.promises if decision else None


def _model(hosted: Hosted, settings: Settings) -> Model:
    run = hosted.run
    return Model(
        name=hosted.name,
        purpose=hosted.run.task.purpose,
        method=run.method.name,
        base_model=run.config.model,
        task=run.task.name,
        kind=hosted.kind,  # type: ignore[arg-type]
        labels=list(run.task.labels) if run.task.labels else None,
        samples=settings.samples,
        deterministic=is_deterministic(run.method, run.training),
        temperature=run.scales.get("temperature"),
        temperature_of_mean=run.scales.get("temperature_of_mean"),
        width=run.scales.get("width"),
        promises=_promises(hosted, settings),
        detection=hosted.detection,
        scope_score=scope.score if (scope := hosted.decision and hosted.decision.scope) else None,
        warnings=run.training.get("warnings", []),
        examples=hosted.examples,  # type: ignore[arg-type]
        metrics=hosted.metrics,
        diagram=hosted.diagram.is_file(),
        adapter_sha256=run.adapter_sha256,
        shared_parameters=hosted.shared_parameters,
    )
