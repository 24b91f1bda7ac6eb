"""The OpenAPI schema: its examples tried, and fuzzed."""

import pytest
from hypothesis import HealthCheck, given, settings

from tests.serving.conftest import serving

schemathesis = pytest.importorskip("schemathesis")


def test_examples_of_the_schema_are_answered(client):
    schema = client.get("/openapi.json").json()
    examples = schema["paths"]["/v1/predict"]["post"]["requestBody"]["content"]["application/json"]["examples"]
    for name, example in examples.items():
        body = example["value"] | {"model": "quiz" if name == "choice" else "desk"}
        assert client.post("/v1/predict", json=body).status_code == 200


def test_every_field_of_every_schema_has_a_description_and_an_example(client):
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    fields = {f"{name}.{field}": of for name, schema in schemas.items() for field, of in schema["properties"].items()}
    assert len(fields) > 40
    assert [name for name, field in fields.items() if not field.get("description")] == []
    missing = {name for name, field in fields.items() if not field.get("examples")}
    # These are lists of other schemas, whose fields have them.
    lists = {"Failure.problems", "Models.models", "Models.data", "OpenAIFailure.error", "PredictResponse.answers"}
    lists |= {"TagsAnswer.entities"}
    assert missing == lists


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_fuzzed_predict(hosted, mode):
    """Right and wrong requests made from the schema: no server error, and no answer that the schema doesn't know."""
    with serving({"desk": hosted["desk"]}) as client:
        codes = fuzzed(client, "/v1/predict", mode, 20)
    assert codes <= {200, 400, 401, 413, 422}
    assert 422 in codes  # of the right ones too: questions, which this run can't answer


def test_fuzzed_rest(client):
    for path in ("/v1/models", "/health", "/ready"):
        assert fuzzed(client, path, "positive", 2) == {200}
    for path in ("/v1/completions", "/v1/chat/completions"):  # of runs that write no text
        assert fuzzed(client, path, "negative", 5) <= {400, 404}


def fuzzed(client, path, mode, max_examples):
    """The codes of the answers; each answer is checked against the schema."""
    (operation,) = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")[path].values()
    codes = set()

    @settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    def run(case):
        response = case.call(base_url=str(client.base_url))
        case.validate_response(response, checks=checks())
        codes.add(response.status_code)

    run()
    return codes


def checks():
    from schemathesis import checks
    from schemathesis.specs.openapi import checks as openapi

    return [
        checks.not_a_server_error,
        openapi.status_code_conformance,
        openapi.content_type_conformance,
        openapi.response_schema_conformance,
        openapi.negative_data_rejection,
    ]
