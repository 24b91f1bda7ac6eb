"""What is refused, with which code, and what the message says."""

import gc
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event, Timer

import httpx
import pytest

from bloblora import runs
from bloblora.serving import Settings, open_hosted, read_keys
from bloblora.serving.hosted import examples_for
from bloblora.tasks.reward import Reward
from tests.serving.conftest import SETTINGS, serving
from tests.tiny_base import queries, write_jsonl

TEXT = {"text": "where is my parcel"}
JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("body", "field", "value", "message"),
    [
        ({}, "inputs", "{}", "Field required"),
        ({"inputs": TEXT, "model": "nobody"}, "model", "'nobody'", "must be one of desk, lora, three, quiz"),
        ({"inputs": TEXT}, "model", "None", "must be one of desk"),
        ({"inputs": TEXT, "model": "desk", "samples": 21}, "samples", "21", "must be at most 20"),
        ({"inputs": TEXT, "model": "desk", "samples": -1}, "samples", "-1", "greater than or equal to 0"),
        ({"inputs": TEXT, "model": "desk", "seed": 1}, "seed", "1", "is no field; the fields are inputs, "),
        ({"inputs": [], "model": "desk"}, "inputs", "[]", "at least 1 item"),
        ({"inputs": [TEXT] * 33, "model": "desk"}, "inputs", "[{'text'", "33 of them; must be at most 32"),
        ({"inputs": [TEXT, {"text": 5}], "model": "desk"}, "inputs[1].text", "5", "valid string"),
        ({"inputs": [{"text": " \n"}], "model": "desk"}, "inputs[0]", "{'text': ' \\n'}", "a text that isn't empty"),
        ({"inputs": {"text": "\ud800"}, "model": "desk"}, "inputs.text", "'\\ud800'", "valid string"),
        ({"inputs": [{"text": "parcel " * 80}], "model": "desk"}, "inputs[0]", "tokens'", "must be at most 128 tokens"),
        ({"inputs": [TEXT], "model": "quiz"}, "inputs[0]", "{'text'", "needs 'question' and 'choices'"),
        ({"inputs": "where is it", "model": "quiz"}, "inputs[0]", "{'text'", "needs 'question' and 'choices'"),
        ({"inputs": "", "model": "desk"}, "inputs", "''", "at least 1 character"),
        ({"inputs": [5], "model": "desk"}, "inputs[0]", "5", "dictionary"),
        ({"inputs": "where is it", "model": "desk", "parameters": {"top_k": 2}}, "parameters", "top_k", "at most 0"),
        ({"inputs": {"question": "What?", "choices": ["a"]}, "model": "quiz"}, "inputs.choices", "['a']", "at least 2"),
        (
            {"inputs": [{"question": "What?", "choices": ["a", " "]}], "model": "quiz"},
            "inputs[0]",
            "'question'",
            "item 1",
        ),
    ],
)
def test_fields_that_cannot_be_used(client, body, field, value, message):
    content = json.dumps(body)  # which escapes the half of a surrogate pair, as httpx doesn't
    response = client.post("/v1/predict", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert any(
        problem["field"] == field and value in problem["value"] and message in problem["message"]
        for problem in response.json()["problems"]
    ), response.text


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [("", "application/json", 422), ("[" * 100_000, "application/json", 400)],
)
def test_no_json(client, content, kind, status):
    response = client.post("/v1/predict", content=content, headers={"Content-Type": kind})
    assert response.status_code == status
    assert response.json()["message"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"inputs": "\xe9"}'.encode("latin-1"), "'utf-8' codec can't decode byte 0xe9"),
        (b'{"samples": 1' + b"0" * 5000 + b"}", "5001 digits"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_why_a_body_cannot_be_read(client, content, reason):
    response = client.post("/v1/predict", content=content, headers=JSON)
    assert response.status_code == 400
    assert response.json()["message"].startswith("the body isn't JSON that can be read: ")
    assert reason in response.json()["message"]


@pytest.mark.parametrize(
    ("content", "headers", "value", "message"),
    [
        ("{", JSON, "''", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ('{"inputs": "a",\n "model": desk}', JSON, "'desk}'", "Expecting value: line 2 column 11 (char 26)"),
        ('{"a": "\ud800"}b', JSON, "'b'", "Extra data: line 1 column 11 (char 10)"),
        ('{"inputs": "a"}', {"Content-Type": "text/plain"}, "b'{", "'Content-Type: application/json'"),
        ("{" * 1000, {}, "b'{{{", "send it with the header 'Content-Type: application/json'"),
    ],
)
def test_what_is_wrong_with_a_body_that_is_no_json(client, content, headers, value, message):
    content = content.encode("utf-8", "surrogatepass")
    response = client.post("/v1/predict", content=content, headers=headers)
    assert response.status_code == 422
    (problem,) = response.json()["problems"]
    assert problem["field"] == "body"
    assert problem["value"].startswith(value)
    assert message in problem["message"]


def test_bodies_too_large(hosted):
    with serving(hosted, replace(SETTINGS, max_body_bytes=200)) as client:
        for content in (b" " * 201, iter([b" " * 150, b" " * 51])):  # with its length, and in chunks
            response = client.post("/v1/predict", content=content, headers={"Content-Type": "application/json"})
            assert response.status_code == 413
            assert "at most 200" in response.json()["message"]
        assert client.post("/v1/predict", json={"inputs": TEXT, "model": "desk"}).status_code == 200


def test_keys(hosted, tmp_path):
    (tmp_path / "keys").write_text("# of the desk\nfirst-key\n\nsecond-key\n")
    keys = read_keys(tmp_path / "keys")
    assert keys == ("first-key", "second-key")
    body = {"inputs": TEXT, "model": "desk"}
    with serving(hosted, keys=keys) as client:
        for key in keys:
            assert client.post("/v1/predict", json=body, headers={"Authorization": f"Bearer {key}"}).is_success
        for header in ("", "Bearer", "Bearer first", "Basic first-key", "Bearer first-keyx", b"Bearer f\xfc"):
            response = client.post("/v1/predict", json=body, headers={"Authorization": header})
            assert (response.status_code, response.headers["WWW-Authenticate"]) == (401, "Bearer")
        for path in ("/v1/models", "/metrics", "/v1/models/desk/reliability.png", "/nowhere"):
            assert client.get(path).status_code == 401
        for path in ("/", "/health", "/ready", "/docs", "/docs/files/swagger-ui.css", "/openapi.json"):
            assert client.get(path).status_code == 200
        schema = client.get("/openapi.json").json()
        assert schema["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
        assert "security" in schema["paths"]["/v1/predict"]["post"]
        assert "security" not in schema["paths"]["/ready"]["get"]


@pytest.fixture
def holding(hosted, monkeypatch):
    """Whether the model has been asked, and what lets it answer."""
    answer, started, go = hosted["desk"].answer, Event(), Event()

    def held(*args):
        started.set()
        assert go.wait(30)
        return answer(*args)

    monkeypatch.setattr(hosted["desk"], "answer", held)
    return started, go


def test_a_full_queue(hosted):
    """While the model is at work four inputs may wait: eight requests of two can't all be held."""
    settings = replace(SETTINGS, queue=4, max_inputs=4, batch_size=1, samples=20)
    body = {"inputs": [TEXT, TEXT], "model": "desk"}
    with serving(hosted, settings) as client, ThreadPoolExecutor(8) as pool:
        responses = [*pool.map(lambda _: client.post("/v1/predict", json=body), range(24))]
        codes = {response.status_code for response in responses}
        assert codes == {200, 429}
        for response in responses:
            if response.status_code == 429:
                assert int(response.headers["Retry-After"]) >= 1
                assert "of at most 4" in response.json()["message"]
        assert client.post("/v1/predict", json=body).status_code == 200


def test_clients_that_have_gone_leave_the_queue(hosted, holding, caplog):
    """The model is at work for a first client; three others fill the queue and go before a fifth comes."""
    started, go = holding
    settings = replace(SETTINGS, queue=6, max_inputs=2, batch_size=2)
    body = {"inputs": [TEXT, TEXT]}
    with serving({"desk": hosted["desk"]}, settings) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/v1/predict", json=body)
        assert started.wait(30)
        for _ in range(3):
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/predict", json=body, timeout=0.3)
        deadline = time.monotonic() + 10
        while len(client.server.config.app.state.batcher) and time.monotonic() < deadline:
            time.sleep(0.01)
        Timer(0.3, go.set).start()
        assert client.post("/v1/predict", json=body).status_code == 200
        assert first.result().status_code == 200
        counts = client.get("/metrics").text
        assert 'bloblora_requests_total{path="/v1/predict",status="499"} 3.0' in counts
        assert 'bloblora_requests_total{path="/v1/predict",status="200"} 2.0' in counts
        assert 'bloblora_batch_size_sum{model="desk"} 4.0' in counts
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_a_stop_finishes_what_is_held(hosted):
    """64 inputs, one at a time; told to stop while they wait."""
    settings = replace(SETTINGS, batch_size=1, samples=20, queue=64)
    with serving(hosted, settings, drain_seconds=1.5) as client, ThreadPoolExecutor(4) as pool:
        held = [pool.submit(client.post, "/v1/predict", json={"inputs": [TEXT] * 32, "model": "desk"}) for _ in "ab"]
        deadline = time.monotonic() + 60
        while not len(client.server.config.app.state.batcher):
            time.sleep(0.001)
        client.server.handle_exit(15, None)
        ready = client.get("/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "stopping"})
        assert client.head("/ready").status_code == 503
        assert client.get("/health").status_code == 200
        assert [len(future.result().json()["answers"]) for future in held] == [32, 32]
        with pytest.raises(httpx.TransportError):  # it still answers until the time is over
            ask_until(deadline, f"{client.base_url}/ready")


def test_what_is_open_when_the_grace_is_over_gets_503(hosted, holding, capfd):
    """One is at the model, one waits, and one's body hasn't come."""
    started, go = holding
    with serving({"desk": hosted["desk"]}, grace_seconds=1.0) as client, ThreadPoolExecutor(2) as pool:
        try:
            asked = [pool.submit(client.post, "/v1/predict", json={"inputs": TEXT}) for _ in "ab"]
            assert started.wait(30)
            host, port = client.base_url.host, client.base_url.port
            with socket.create_connection((host, port)) as unfinished:
                head = f"POST /v1/predict HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9\r\n\r\n{{"
                unfinished.sendall(head.encode())
                client.server.handle_exit(15, None)
                for response in [future.result() for future in asked]:
                    assert (response.status_code, response.headers["Connection"]) == (503, "close")
                    assert response.json() == {
                        "message": "the server has stopped before the answer was complete",
                        "problems": [],
                    }
                assert unfinished.recv(1000).startswith(b"HTTP/1.1 503 ")
        finally:
            go.set()
    assert "Traceback" not in capfd.readouterr().err


def ask_until(deadline, url):
    while time.monotonic() < deadline:
        httpx.get(url)


def test_an_error_of_the_model_is_everyones_answer(hosted, monkeypatch):
    def broken(*_):
        raise FloatingPointError("not a number")

    with serving({"desk": hosted["desk"]}) as client:
        monkeypatch.setattr(hosted["desk"], "answer", broken)
        response = client.post("/v1/predict", json={"inputs": TEXT})
        assert response.status_code == 500
        assert response.json()["message"] == "FloatingPointError on the server, whose log says more"
        assert response.headers["Connection"] == "close"  # uvicorn hangs up, and a request on it would be lost
        monkeypatch.undo()
        assert client.post("/v1/predict", json={"inputs": TEXT}).status_code == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": -1}, "samples must be 0"),
        (
            {"batch_size": 0, "max_choices": 0, "max_tokens": 0},
            "max_choices must be at least 1, got 0\nmax_tokens must be at least 1, got 0",
        ),
        ({"max_samples": 5}, "max_samples must be at least samples, 10, got 5"),
        ({"max_wait_ms": float("nan")}, "max_wait_ms must be a finite number of at least 0, got nan"),
        ({"read_seconds": 0.0}, "read_seconds must be a finite number above 0, got 0.0"),
        ({"queue": 8}, "queue must be at least max_inputs, 64, got 8"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(runs.RunError) as error:
        Settings(**options)
    assert message in str(error.value)


def test_runs_that_cannot_be_served(folders, tmp_path):
    for directories, message in (
        ([], "give at least one folder"),
        ([str(tmp_path)], "no run.json in it"),
        ([folders["desk"], folders["desk"]], "are both called 'desk'; give NAME=FOLDER"),
        ([f"a b={folders['desk']}"], "the name 'a b'"),
    ):
        with pytest.raises(runs.RunError, match=message):
            open_hosted(directories, SETTINGS)
    with pytest.raises(runs.RunError, match=r"num_samples 3, .* there, num_samples 10, .* now"):
        open_hosted([folders["desk"]], Settings())
    assert list(open_hosted([folders["desk"], f"again={folders['desk']}"], SETTINGS)) == ["desk", "again"]


def test_examples(folders, tmp_path):
    """Those of a file where its kind is the run's, else of what the server says anyway, never of the training data."""
    desk, quiz = (runs.open_run(folders[name]) for name in ("desk", "quiz"))
    file = write_jsonl(tmp_path / "examples.jsonl", [{"text": "it is late", "label": "parcel", "id": 5}])
    assert examples_for(desk, str(file)) == [{"text": "it is late"}]
    assert examples_for(quiz, str(file)) == examples_for(quiz) != []
    trained_on = {record["text"] for record in queries()}
    assert not trained_on & {example["text"] for example in examples_for(desk)}
    numbers = replace(desk, task=replace(desk.task, labels=("0", "1")))
    assert next(example["text"] for example in examples_for(numbers)) == "could you help me with this, please"
    bundled = replace(desk, config=desk.config.with_options(data="support_desk:train"))
    assert examples_for(bundled)[1] == {"text": "i want out"}
    pair = {"text": "it is late", "text_pair": "where is my parcel"}
    assert examples_for(desk, str(write_jsonl(tmp_path / "pair.jsonl", [{**pair, "label": "parcel"}]))) == [pair]
    rewards = replace(desk, task=Reward(pad_token_id=0))
    chosen = [{"prompt": "why?", "chosen": "since", "rejected": "as"}]
    found = examples_for(rewards, str(write_jsonl(tmp_path / "pairs.jsonl", chosen)))
    assert found == [{"prompt": "why?", "responses": ["as", "since"]}]
    chat = [{"role": "user", "content": "where?"}]
    for records, directory, message in (
        ([{"messages": chat}], "desk", r"wrong\.jsonl': records with messages; give each a 'prompt' that is a text"),
        ([{"prompt": chat, "responses": ["a"]}], "desk", "records with messages; give each a 'prompt'"),
        ([{"text": "a"}] * 7, "desk", "7 records; give at most 6"),
        ([{"text": "a"}], "quiz", "records with 'text'; no run takes these"),
    ):
        file = str(write_jsonl(tmp_path / "wrong.jsonl", records))
        with pytest.raises(runs.RunError, match=message):
            open_hosted([folders[directory]], replace(SETTINGS, examples=file))


@pytest.mark.parametrize("content", [None, "# none\n", "two words\n", "schlüssel\n"])
def test_key_files(tmp_path, content):
    if content is not None:
        (tmp_path / "keys").write_text(content, encoding="utf-8")
    with pytest.raises(runs.RunError, match="api_key_file"):
        read_keys(tmp_path / "keys")
