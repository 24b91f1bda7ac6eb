"""Requests and answers, from which FastAPI writes the OpenAPI schema, and the metrics that Prometheus reads."""

import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema
from starlette.types import ASGIApp, Message, Receive, Scope, Send

Text = Annotated[str, Field(min_length=1)]
_TEXT, _CHOICE = "where is my parcel, it was due on monday", "Which gas do plants take in?"
_CHOICES = ["oxygen", "carbon dioxide"]
_WORDS = ["Ada", "Lovelace", "lived", "in", "London"]
_PROBABILITIES = {"late_delivery": 0.62, "track_order": 0.38}
_MAX_FIELDS = 20
_PROMISES = {"answering": "at most 0.1 of the answered are wrong, with probability 0.95"}


def _field(description: str, example: Any, **options: Any) -> Any:
    """A field of the schema, which is required unless ``options`` give a default."""
    return Field(description=description, examples=[example], **options)


def _at_most(limit: str) -> BeforeValidator:
    """Refuses a list before its items are validated; ``limit`` is a field of a request's context, the settings."""

    def check(value: Any, info: ValidationInfo) -> Any:
        most = getattr(info.context, limit, math.inf)  # what the server itself says has no context
        if isinstance(value, list) and len(value) > most:
            raise PydanticCustomError("too_many", f"{len(value)} of them; must be at most {most}")
        return value

    return BeforeValidator(check)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        """Refuses many unknown fields together, before each is an error of its own."""
        if isinstance(value, dict) and len(value) > max(_MAX_FIELDS, len(cls.model_fields)):
            known = ", ".join(cls.model_fields)
            raise PydanticCustomError("too_many_fields", f"{len(value)} fields; must be among {known}")
        return value


class TextInput(_Strict):
    """A text to classify, or a pair of texts."""

    text: Text = _field("not blank", _TEXT)
    text_pair: Text | None = _field("the second of two texts that are classified together", _TEXT, default=None)


class ChoiceInput(_Strict):
    """A question with choices."""

    question: Text = _field("not blank", _CHOICE)
    choices: Annotated[list[Text], _at_most("max_choices"), _field("none blank", _CHOICES, min_length=2)]


class ResponsesInput(_Strict):
    """Responses to give rewards, to a prompt where there is one."""

    prompt: Text | None = _field("what they respond to", _CHOICE, default=None)
    responses: Annotated[list[Text], _at_most("max_choices"), _field("none blank", _CHOICES, min_length=1)]


class TokensInput(_Strict):
    """A text as a list of words, punctuation too, as in the training data."""

    tokens: Annotated[list[Text], _at_most("max_tokens"), _field("none blank", _WORDS, min_length=1)]


class PromptInput(_Strict):
    """A prompt to answer."""

    prompt: Text = _field("not blank", _CHOICE)


INPUTS: dict[str, type[BaseModel]] = {
    "text": TextInput,
    "choice": ChoiceInput,
    "preference": ResponsesInput,
    "tokens": TokensInput,
    "prompt": PromptInput,
}
"""What an input is, by `Hosted.kind`."""


def _form(value: Any) -> str:
    """Which form of one input a value has: its tag, which `problems` leaves out of an error's place."""
    if isinstance(value, str):
        return "<plain>"
    there = value if isinstance(value, dict) else dir(value)
    return next((f"<{name}>" for name in ("text", "responses", "tokens") if name in there), "<choice>")


_ONE_OR_MANY = Discriminator(lambda value: "<many>" if isinstance(value, list) else "<one>")
Input = Annotated[
    Annotated[Text, Tag("<plain>")]
    | Annotated[TextInput, Tag("<text>")]
    | Annotated[ResponsesInput, Tag("<responses>")]
    | Annotated[TokensInput, Tag("<tokens>")]
    | Annotated[ChoiceInput, Tag("<choice>")],
    Discriminator(_form),
]
Inputs = Annotated[
    Annotated[Input, Tag("<one>")] | Annotated[list[Input], Field(min_length=1), _at_most("max_inputs"), Tag("<many>")],
    _ONE_OR_MANY,
]


class PredictRequest(_Strict):
    """One input or many, all of the kind that the run was trained on."""

    inputs: Inputs = _field(
        "a text, a record in a form that `bloblora train` takes, or a list; Hugging Face's clients send texts",
        _TEXT,
    )
    model: str | None = _field("name of a run; needed where several are served", "desk", default=None)
    samples: Annotated[int, Field(ge=0)] | None = _field(
        "weight samples N; 0 is the posterior mean; decisions exist for the server's own N only", 10, default=None
    )
    parameters: Annotated[dict[str, Any], Field(max_length=0)] | None = _field(
        "none exist; Hugging Face's clients send it empty", {}, default=None
    )


Stop = Annotated[str, Field(min_length=1, max_length=200)]
Stops = Annotated[
    Annotated[Stop | None, Tag("<one>")] | Annotated[list[Stop], Field(min_length=1, max_length=4), Tag("<many>")],
    _ONE_OR_MANY,
]
Prompts = Annotated[
    Annotated[Text, Tag("<one>")] | Annotated[list[Text], Field(min_length=1), _at_most("max_inputs"), Tag("<many>")],
    _ONE_OR_MANY,
]


class StreamOptions(_Strict):
    """What a stream has besides."""

    include_usage: bool | None = _field("whether a last event counts the tokens", True, default=None)


class _Writing(_Strict):
    """What completions and chat completions have in common: OpenAI's fields, and `samples`."""

    model: str | None = _field(
        "name of a run; needed where several that write text are served", "answers", default=None
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = _field("most tokens of the answer", 64, default=None)
    temperature: Annotated[float, Field(ge=0, le=2)] | None = _field(
        "0 takes the most probable token, and is the default; above it tokens are sampled", 0.0, default=None
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = _field(
        "sample only among the most probable tokens that have this probability together", 1.0, default=None
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = _field(
        "of the weight samples and of sampled tokens: equal requests get equal answers", 0, default=None
    )
    stop: Stops = _field("texts before which the answer ends", ["\n"], default=None)
    stream: bool | None = _field("send the answer as server-sent events while it is written", False, default=None)
    stream_options: StreamOptions | None = _field("with `stream`", {"include_usage": True}, default=None)
    samples: Annotated[int, Field(ge=0)] | None = _field(
        "bloblora's own: weight samples N; 0 is the posterior mean", 10, default=None
    )
    decoding: Literal["mean", "average"] | None = _field(
        "bloblora's own: tokens by the posterior mean, whose answer the weight samples then read, or by their average",
        "mean",
        default=None,
    )
    draws: bool | None = _field(
        "bloblora's own: also what each weight sample writes by itself, and the measures that compare these answers",
        True,
        default=None,
    )
    answers: Annotated[int, Field(ge=0)] | None = _field(
        "bloblora's own: so many sampled answers besides, and their semantic entropy", 5, default=None
    )
    answer_temperature: Annotated[float, Field(gt=0, le=2)] | None = _field("of `answers`", 1.0, default=None)
    agree: Literal["exact", "normalized", "numeric"] | None = _field(
        "bloblora's own: when two answers mean the same", "normalized", default=None
    )
    p_true: bool | None = _field("bloblora's own: also ask the model whether its answer is true", True, default=None)
    n: Annotated[int, Field(ge=1, le=1)] | None = _field("answers a prompt: there is one", 1, default=None)
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = _field("there is none", 0.0, default=None)
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = _field("there is none", 0.0, default=None)
    user: str | None = _field("who asks; it changes nothing", "me", default=None)


class CompletionRequest(_Writing):
    """Prompts whose continuation is asked for."""

    prompt: Prompts = _field("a text, or a list of texts", "Question: Which gas do plants take in?\nAnswer:")
    echo: Literal[False] | None = _field("the answer comes without its prompt", False, default=None)
    best_of: Annotated[int, Field(ge=1, le=1)] | None = _field("answers to choose from: there is one", 1, default=None)
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = _field(
        "log-probabilities of the answer's tokens, and of so many most probable ones", 2, default=None
    )


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"] = _field("text is all that is read", "text")
    text: Text = _field("not blank", _CHOICE)


_Parts = Annotated[list[TextPart], Field(min_length=1), _at_most("max_inputs")]
Content = Annotated[Annotated[str, Tag("<one>")] | Annotated[_Parts, Tag("<many>")], _ONE_OR_MANY]


class ChatMessage(_Strict):
    """One message of a chat; an answer goes back as OpenAI's client has it, with fields that are null."""

    role: Literal["system", "developer", "user", "assistant"] = _field(
        "who says it; the last is not the assistant's", "user"
    )
    content: Content = _field("what is said; a user's isn't blank", _CHOICE)
    name: str | None = _field("which of several users says it; templates don't read it", "Ada", default=None)
    refusal: None = _field("of an answer; there is none", None, default=None)
    annotations: None = _field("of an answer; there are none", None, default=None)
    audio: None = _field("of an answer; there is none", None, default=None)
    function_call: None = _field("of an answer; there is none", None, default=None)
    tool_calls: None = _field("of an answer; there are none", None, default=None)

    @field_validator("content")
    @classmethod
    def _not_blank(cls, content: Any, info: ValidationInfo) -> Any:
        """Refuses a user's message that says nothing."""
        if info.data.get("role") == "user" and content == "":
            raise PydanticCustomError("blank", "must be a text that isn't empty, of a user's message")
        return content


class ResponseFormat(_Strict):
    """What an answer is."""

    type: Literal["text"] = _field("text is all that is written", "text")


class ChatRequest(_Writing):
    """A chat whose next message is asked for, in the template of the run's tokenizer."""

    messages: Annotated[list[ChatMessage], Field(min_length=1), _at_most("max_inputs")] = _field(
        "from the first to the last", [{"role": "user", "content": _CHOICE}]
    )
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = _field("the same as `max_tokens`", 64, default=None)
    response_format: ResponseFormat | None = _field("text", {"type": "text"}, default=None)
    store: Literal[False] | None = _field("nothing is kept", False, default=None)
    logprobs: bool | None = _field("log-probabilities of the answer's tokens", True, default=None)
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = _field(
        "and of so many most probable ones", 2, default=None
    )


class AnyBody:
    """JSON with the schema of `PredictRequest`, which isn't validated by FastAPI: that would block the event loop."""

    model: ClassVar[type[BaseModel]] = PredictRequest

    @classmethod
    def __get_pydantic_core_schema__(cls, *_: Any) -> CoreSchema:
        return core_schema.any_schema()

    @classmethod
    def __get_pydantic_json_schema__(cls, _: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(cls.model.__pydantic_core_schema__)


class AnyCompletion(AnyBody):
    """The same with the schema of `CompletionRequest`."""

    model = CompletionRequest


class AnyChat(AnyBody):
    """The same with the schema of `ChatRequest`."""

    model = ChatRequest


EXAMPLES: dict[str, Any] = {
    "one": {"summary": "One text", "value": {"inputs": _TEXT}},
    "many": {
        "summary": "Several texts",
        "value": {"inputs": [{"text": _TEXT}, {"text": "i was charged twice"}], "samples": 10},
    },
    "choice": {
        "summary": "A question with choices",
        "value": {"inputs": [{"question": _CHOICE, "choices": _CHOICES}]},
    },
}


class _Scored(BaseModel):
    """What an answer of any kind has."""

    mahalanobis: float | None = _field(
        "squared distance from the training data in standard deviations, where the run knows it", 612.0, default=None
    )
    relative_mahalanobis: float | None = _field("the same, less that from all training data", -3.1, default=None)
    out_of_scope: bool | None = _field("of a calibrated run", False, default=None)
    num_draws: int = _field("weight samples that were used; 1 where there is a single function", 10)


class Answer(_Scored):
    """What the run says of one input; uncertainty in nats."""

    label: str = _field("the most probable label, or choice", "late_delivery")
    probabilities: dict[str, float] = _field("averaged over the weight samples, by label or choice", _PROBABILITIES)
    std: dict[str, float] = _field(
        "standard deviation of each probability over the weight samples", {"late_delivery": 0.21, "track_order": 0.21}
    )
    confidence: float = _field("probability of the label", 0.62)
    predictive_entropy: float = _field("total uncertainty", 0.66)
    mutual_information: float = _field("of it epistemic: how far the weight samples disagree; 0 for one draw", 0.09)
    expected_entropy: float = _field("of it aleatoric: what each weight sample leaves open", 0.57)
    truncated_tokens: int = _field("tokens cut off because the model reads no more", 0)
    decision: Literal["answer", "abstain"] | None = _field("of a calibrated run", "abstain", default=None)
    label_set: list[str] | None = _field(
        "of a calibrated run, the most probable first", ["late_delivery", "track_order"], default=None
    )


class RewardAnswer(Answer):
    """What a run that gives rewards says of the responses to one prompt; those of a list are in their order."""

    best: str = _field("the response with the highest lower bound", _CHOICES[1])
    rewards: list[float] = _field("relative to their mean where there are several", [-0.4, 0.4])
    reward_stds: list[float] = _field("how far the weight samples disagree", [0.2, 0.2])
    lower_bounds: list[float] = _field("reward less one standard deviation", [-0.6, 0.2])


class ValueAnswer(_Scored):
    """What a run that predicts numbers says of one input, in the units of its data."""

    value: float = _field("the predictive mean", 3.4)
    std: float = _field("predictive standard deviation", 0.5)
    aleatoric_std: float = _field("of it what the input leaves open", 0.4)
    epistemic_std: float = _field("of it how far the weight samples disagree; 0 for one draw", 0.3)
    interval: tuple[float, float] = _field("what has 90 % of the predictive probability", [2.6, 4.2])
    promised_interval: tuple[float, float] | None = _field("of a calibrated run", [2.4, 4.4], default=None)
    truncated_tokens: int = _field("tokens cut off because the model reads no more", 0)


class LabelsAnswer(_Scored):
    """What a run with several labels at once says of one input; uncertainty in nats, summed over the labels."""

    labels: list[str] = _field("those that are more probable than not", ["late", "damaged"])
    probabilities: dict[str, float] = _field("of each label, averaged", {"late": 0.9, "damaged": 0.6})
    std: dict[str, float] = _field("their standard deviations over the weight samples", {"late": 0.1, "damaged": 0.2})
    predictive_entropy: float = _field("total uncertainty", 0.99)
    mutual_information: float = _field("of it epistemic: how far the weight samples disagree; 0 for one draw", 0.09)
    expected_entropy: float = _field("of it aleatoric: what each weight sample leaves open", 0.9)
    promised_labels: list[str] | None = _field("of a calibrated run", ["late", "damaged", "lost"], default=None)
    truncated_tokens: int = _field("tokens cut off because the model reads no more", 0)


class Entity(BaseModel):
    """One that is read in the tags, from the token at `start` to the one before `end`."""

    entity: str = _field("its type", "PER")
    start: int = _field("of its first token, counted from 0", 0)
    end: int = _field("after its last token", 2)
    probability: float = _field("that there is exactly this one", 0.94)
    text: str = _field("its tokens", "Ada Lovelace")


class TagsAnswer(_Scored):
    """What a run that classifies tokens says of one input, with a list item a token; uncertainty in nats."""

    tokens: list[str] = _field("as they were given", _WORDS)
    tags: list[str] = _field("the most probable of each token", ["B-PER", "I-PER", "O", "O", "B-LOC"])
    entities: list[Entity] = Field(description="where tags have the form BIO")
    token_confidence: list[float] = _field("probability of each tag", [0.96, 0.98, 0.99, 0.99, 0.9])
    token_entropy: list[float] = _field("total uncertainty of each token", [0.2, 0.1, 0.06, 0.06, 0.4])
    token_mutual_information: list[float] = _field("of it epistemic", [0.02, 0.01, 0.0, 0.0, 0.1])
    predictive_entropy: float = _field("mean over the tokens", 0.16)
    mutual_information: float = _field("mean over the tokens; 0 for one draw", 0.03)
    expected_entropy: float = _field("mean over the tokens", 0.13)
    tag_sets: list[list[str]] | None = _field("of a calibrated run", [["B-PER"], ["I-PER"]], default=None)


AnyAnswer = RewardAnswer | Answer | LabelsAnswer | ValueAnswer | TagsAnswer


def answer_of(line: dict[str, Any]) -> AnyAnswer:
    """The answer that a line of `Hosted.answer` holds."""
    kinds = {"value": ValueAnswer, "tags": TagsAnswer, "labels": LabelsAnswer, "rewards": RewardAnswer, "label": Answer}
    return next(kind for name, kind in kinds.items() if name in line)(**line)


class PredictResponse(BaseModel):
    """The answers, in the order of the inputs."""

    model: str = _field("name of the run that answered", "desk")
    samples: int = _field("weight samples N that were asked for", 10)
    answers: list[AnyAnswer] = Field(description="one for each input")


class Model(BaseModel):
    """A run that is served."""

    name: str = _field("what requests call it", "desk")
    purpose: str = _field("what it is for, in a sentence", "Sorts a text into one of 2 labels: parcel, refund.")
    method: str = _field("how its posterior was made, as `bloblora train --method` has it", "blob")
    base_model: str = _field("the pretrained model below its adapter", "smollm2-135m")
    task: str = _field("how inputs become logits", "classification")
    kind: Literal["text", "choice", "preference", "tokens", "prompt"] = _field(
        "which inputs it takes; of prompts it writes the answers", "text"
    )
    labels: list[str] | None = _field("None: each question has its own choices", ["parcel", "refund"])
    samples: int = _field("N of a request that names none", 10)
    deterministic: bool = _field("whether it has one set of weights, and so no weight samples that differ", False)
    temperature: float | None = _field("T that divides its logits; None where none was fitted", 1.2)
    temperature_of_mean: float | None = _field("the same of the posterior mean alone, with 0 samples", 1.4)
    width: float | None = _field("τ by which its posterior's width was scaled; None where none was fitted", 0.8)
    promises: dict[str, str] | None = _field("of its calibrated decisions; None where there are none", _PROMISES)
    detection: float | None = _field(
        "share of the out-of-scope records of `bloblora calibrate --ood` that were flagged; None without them", 0.4
    )
    scope_score: str | None = _field("what flags a text as out of scope; None without that rule", "mahalanobis")
    warnings: list[str] = _field("of its training, where that ended badly", ["the posterior is the prior"])
    examples: list[TextInput | TokensInput | ChoiceInput | ResponsesInput | PromptInput] = _field(
        "inputs to try", [{"text": _TEXT}]
    )
    metrics: dict[str, float] = _field("what metrics.json in its folder says", {"accuracy": 0.81, "ece": 0.05})
    diagram: bool = _field("whether its folder has a reliability.png", True)
    adapter_sha256: str | None = _field("of the trained weights' file", "d99e6bd2acc406b2")
    shared_parameters: int = _field("entries of its weights that an earlier run holds too", 134_515_008)


class Writer(BaseModel):
    """A run that writes text, as OpenAI's clients know models."""

    id: str = _field("what requests call it", "answers")
    object: Literal["model"] = _field("what this is", "model")
    created: int = _field("when its training ended, seconds since 1970", 1_790_000_000)
    owned_by: str = _field("who made it", "bloblora")


class Models(BaseModel):
    """All runs that are served."""

    models: list[Model] = Field(description="in the order of the command line")
    object: Literal["list"] = _field("what this is for OpenAI's clients", "list")
    data: list[Writer] = Field(description="those that write text, as OpenAI's clients know models")


class Status(BaseModel):
    """Of the server."""

    status: Literal["ok", "ready", "stopping"] = _field("the process lives, takes requests, or was told to stop", "ok")


class Problem(BaseModel):
    """What is wrong with one field."""

    field: str = _field("its place in the body", "inputs[0].text")
    value: str = _field("as found, shortened", "''")
    message: str = _field("what would be right", "String should have at least 1 character")


class Failure(BaseModel):
    """Why there is no answer."""

    message: str = _field("what is wrong", "can't be used: inputs[0].text")
    problems: list[Problem] = Field([], description="by field, where fields are wrong")


class OpenAIError(BaseModel):
    """What is wrong, as OpenAI's servers say it."""

    message: str = _field("what is wrong", "max_tokens: 0: Input should be greater than or equal to 1")
    type: str = _field("what kind of error it is", "invalid_request_error")
    param: str | None = _field("the field that is wrong", "max_tokens")
    code: str | None = _field("a word for it, of some", "context_length_exceeded")


class OpenAIFailure(BaseModel):
    """Why there is no answer, as OpenAI's servers say it."""

    error: OpenAIError = Field(description="what is wrong")


OPENAI_PATHS = ("/v1/completions", "/v1/chat/completions")
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
_CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}


def failure(path: str, status: int, message: str, problems: Sequence[Problem] = (), code: str | None = None) -> dict:
    """Why a request to a path has no answer, in that path's own form."""
    if path not in OPENAI_PATHS:
        return Failure(message=message, problems=[*problems]).model_dump()
    if problems:
        message = "; ".join(f"{problem.field}: {problem.value}: {problem.message}" for problem in problems)
    kind = _TYPES.get(status, "invalid_request_error")
    error = OpenAIError(
        message=message, type=kind, param=problems[0].field if problems else None, code=code or _CODES.get(status)
    )
    return OpenAIFailure(error=error).model_dump()


def event(content: dict[str, Any]) -> str:
    """One of a stream's server-sent events."""
    return f"data: {json.dumps(content, allow_nan=False)}\n\n"


_PATHS = ("/", "/v1/predict", *OPENAI_PATHS, "/v1/models", "/health", "/ready", "/metrics", "/docs", "/openapi.json")
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
