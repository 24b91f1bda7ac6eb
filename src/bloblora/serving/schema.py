"""Requests and answers, from which FastAPI writes the OpenAPI schema, and the metrics that Prometheus reads."""

import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag
from starlette.types import ASGIApp, Message, Receive, Scope, Send

Text = Annotated[str, Field(min_length=1)]
_TEXT = {"text": "where is my parcel, it was due on monday"}
_CHOICE = {"question": "Which gas do plants take in?", "choices": ["oxygen", "carbon dioxide"]}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextInput(_Strict):
    """A text to classify, or a pair of texts."""

    text: Text = Field(description="not blank", examples=[_TEXT["text"]])
    text_pair: Text | None = Field(None, description="the second of two texts that are classified together")


class ChoiceInput(_Strict):
    """A question with choices."""

    question: Text = Field(description="not blank", examples=[_CHOICE["question"]])
    choices: Annotated[list[Text], Field(min_length=2, description="none blank", examples=[_CHOICE["choices"]])]


Input = Annotated[
    Annotated[TextInput, Tag("<text>")] | Annotated[ChoiceInput, Tag("<choice>")],
    Discriminator(
        lambda value: "<text>" if "text" in (value if isinstance(value, dict) else dir(value)) else "<choice>"
    ),
]
Inputs = Annotated[
    Annotated[Input, Tag("<one>")] | Annotated[list[Input], Field(min_length=1), Tag("<many>")],
    Discriminator(lambda value: "<many>" if isinstance(value, list) else "<one>"),
]


class PredictRequest(_Strict):
    """One input or many, all of the kind that the run was trained on."""

    inputs: Inputs = Field(description="a record or a list of records, in the forms that `bloblora train` takes")
    model: str | None = Field(None, description="name of a run; needed where several are served")
    samples: Annotated[int, Field(ge=0)] | None = Field(
        None, description="weight samples N; 0 is the posterior mean; decisions exist for the server's own N only"
    )


EXAMPLES: dict[str, Any] = {
    "one": {"summary": "One text", "value": {"inputs": _TEXT}},
    "many": {"summary": "Several texts", "value": {"inputs": [_TEXT, {"text": "i was charged twice"}], "samples": 10}},
    "choice": {"summary": "A question with choices", "value": {"inputs": [_CHOICE]}},
}


class Answer(BaseModel):
    """What the run says of one input; uncertainty in nats."""

    label: str = Field(description="the most probable label, or choice")
    probabilities: dict[str, float] = Field(description="averaged over the weight samples, by label or choice")
    std: dict[str, float] = Field(description="standard deviation of each probability over the weight samples")
    confidence: float = Field(description="probability of the label")
    predictive_entropy: float = Field(description="all uncertainty")
    mutual_information: float = Field(description="of it epistemic: what the model doesn't know; 0 for one draw")
    expected_entropy: float = Field(description="of it aleatoric: what the input leaves open")
    num_draws: int = Field(description="weight samples that were used; 1 where there is a single function")
    truncated_tokens: int = Field(description="tokens cut off because the model reads no more")
    decision: Literal["answer", "abstain"] | None = Field(None, description="of a calibrated run")
    label_set: list[str] | None = Field(None, description="of a calibrated run, the most probable first")
    out_of_scope: bool | None = Field(None, description="of a calibrated run")


class PredictResponse(BaseModel):
    """The answers, in the order of the inputs."""

    model: str
    samples: int
    answers: list[Answer]


class Model(BaseModel):
    """A run that is served."""

    name: str
    method: str
    base_model: str
    task: str
    kind: Literal["text", "choice"] = Field(description="which inputs it takes")
    labels: list[str] | None = Field(description="None: each question has its own choices")
    samples: int = Field(description="N of a request that names none")
    temperature: float | None = Field(description="T that divides its logits; None where none was fitted")
    width: float | None = Field(description="τ by which its posterior's width was scaled; None where none was fitted")
    promises: dict[str, str] | None = Field(description="of its decisions")
    metrics: dict[str, float] = Field(description="what metrics.json in its folder says")
    diagram: bool = Field(description="whether its folder has a reliability.png")
    adapter_sha256: str | None
    shared_parameters: int = Field(description="entries of its weights that an earlier run holds too")


class Models(BaseModel):
    """All runs that are served."""

    models: list[Model]


class Status(BaseModel):
    """Of the server."""

    status: Literal["ok", "ready", "stopping"]


class Problem(BaseModel):
    """What is wrong with one field."""

    field: str = Field(examples=["inputs[0].text"])
    value: str = Field(description="as found, shortened", examples=["''"])
    message: str


class Failure(BaseModel):
    """Why there is no answer."""

    message: str
    problems: list[Problem] = []


_PATHS = ("/", "/v1/predict", "/v1/models", "/health", "/ready", "/metrics", "/openapi.json")
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one server, in a registry of its own; ``queue_length`` says how many inputs wait."""

    def __init__(self, queue_length: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        kept: dict[str, Any] = {"namespace": "bloblora", "registry": self._registry}
        self._requests = Counter("requests", "Requests.", ("path", "status"), **kept)
        self._seconds = Histogram("request_seconds", "Time of a request.", ("path",), buckets=_SECONDS, **kept)
        self._sizes = Histogram("batch_size", "Inputs a batch.", ("model",), buckets=_SIZES, **kept)
        self._draws = Counter("draws", "Weight samples, summed over inputs.", ("model",), **kept)
        Gauge("queue_length", "Inputs that wait.", **kept).set_function(queue_length)

    def batch(self, model: str, size: int, draws: int) -> None:
        """Count a batch."""
        self._sizes.labels(model).observe(size)
        self._draws.labels(model).inc(draws)

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)

    def counted(self, app: ASGIApp) -> ASGIApp:
        """ASGI middleware: counts and times the requests of an app."""

        async def call(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            status, start = 500, time.perf_counter()

            async def noted(message: Message) -> None:
                nonlocal status
                status = message.get("status", status)
                await send(message)

            try:
                await app(scope, receive, noted)
            finally:
                path = scope["path"] if scope["path"] in _PATHS else "other"  # so that clients can't add label values
                self._requests.labels(path, status).inc()
                self._seconds.labels(path).observe(time.perf_counter() - start)

        return call
