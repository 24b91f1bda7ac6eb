"""What requests and answers look like; FastAPI writes the OpenAPI schema from it."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

Text = Annotated[str, Field(min_length=1)]
_TEXT = {"text": "where is my parcel, it was due on monday"}
_CHOICE = {"question": "Which gas do plants take in?", "choices": ["oxygen", "carbon dioxide"]}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextInput(_Strict):
    """A text to classify."""

    text: Text = Field(description="not blank", examples=[_TEXT["text"]])


class ChoiceInput(_Strict):
    """A question with choices."""

    question: Text = Field(description="not blank", examples=[_CHOICE["question"]])
    choices: Annotated[list[Text], Field(min_length=2, description="none blank", examples=[_CHOICE["choices"]])]


Input = Annotated[
    Annotated[TextInput, Tag("<text>")] | Annotated[ChoiceInput, Tag("<choice>")],
    Discriminator(lambda value: "<text>" if "text" in _fields(value) else "<choice>"),
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
        None, description="weight draws N, 0: the posterior mean; decisions are there for the server's own N alone"
    )


EXAMPLES: dict[str, Any] = {
    "one": {"summary": "One text", "value": {"inputs": _TEXT}},
    "many": {"summary": "Several texts", "value": {"inputs": [_TEXT, {"text": "i was charged twice"}], "samples": 10}},
    "choice": {"summary": "A question with choices", "value": {"inputs": [_CHOICE]}},
}


class Answer(BaseModel):
    """What the run says of one input; uncertainty in nats."""

    label: str = Field(description="the most probable label, or choice")
    probabilities: dict[str, float] = Field(description="averaged over the draws, by label or choice")
    std: dict[str, float] = Field(description="standard deviation of each probability over the draws")
    confidence: float = Field(description="probability of the label")
    predictive_entropy: float = Field(description="all uncertainty")
    mutual_information: float = Field(description="of it epistemic: what the model doesn't know")
    expected_entropy: float = Field(description="of it aleatoric: what the input leaves open")
    num_draws: int = Field(description="draws that were made; 1 for a point")
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
    problems: list[Problem] = Field(default=[])


def _fields(value: Any) -> Any:
    return value if isinstance(value, dict) else dir(value)
