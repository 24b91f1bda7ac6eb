"""Requests made to block, exhaust or fool a server: it goes on answering others, and ends when it is told to."""

import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from multiprocessing import get_context

import pytest

from bloblora.serving import bind, create_app, load_hosted, open_hosted, run_server
from tests.serving.conftest import SETTINGS, serving, trained
from tests.serving.test_schema import fuzzed

TEXT = {"text": "where is my parcel"}
BODY = {"inputs": TEXT, "model": "lora"}


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    return trained(base, tmp_path_factory.mktemp("hostile"), "lora", "quiz")


@pytest.fixture(scope="module")
def hosted(folders):
    return load_hosted(open_hosted([*folders.values()], SETTINGS), SETTINGS)


@pytest.fixture(scope="module")
def client(hosted):
    """Of a server that waits a third of a second for a request, and has one name besides localhost."""
    with serving(hosted, replace(SETTINGS, read_seconds=0.3, max_choices=8), allowed_hosts=["desk.example"]) as client:
        yield client


def connection(client):
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=10)


def received(opened):
    """All that comes until the server ends the connection."""
    parts = []
    with suppress(ConnectionResetError):
        while part := opened.recv(65_536):
            parts.append(part)
    return b"".join(parts).decode()


@pytest.mark.parametrize(
    ("content", "field", "message"),
    [
        ('{"inputs":[' + ",".join(["5"] * 490_000) + "]}", "inputs", "490000 of them; must be at most 32"),
        ('{"inputs":[' + ",".join(["[]"] * 330_000) + "]}", "inputs", "330000 of them; must be at most 32"),
        ('{"inputs":{"question":"a","choices":[' + '"",' * 330_000 + '""]}}', "inputs.choices", "must be at most 8"),
        ('{"inputs":{' + '"":1,' * 190_000 + '"text":5}}', "inputs.text", "valid string"),
        ('{"inputs":{' + ",".join(f'"{i}":1' for i in range(90_000)) + "}}", "inputs", "90000 fields; must be among"),
        ('{"inputs":[' + ",".join(['{"a":1,"text":[]}'] * 32) + "]}", "inputs[0].text", "valid string"),
        ('{"inputs":"' + "a " * 490_000 + '", "model": "lora"}', "inputs[0]", "at most 2048 characters, 16 for each"),
        ('{"inputs":"a", "model":"' + "a" * 900_000 + '"}', "model", "must be one of"),
        ('{"inputs":{' + "1," * 490_000 + "}}", "body", "JSON"),
    ],
    ids=["numbers", "lists", "choices", "keys", "fields", "records", "characters", "name", "no_json"],
)
def test_a_megabyte_of_bad_inputs(client, content, field, message):
    """It is refused at once and in few words; others are answered meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        start = time.monotonic()
        held = pool.submit(client.post, "/v1/predict", content=content, headers={"Content-Type": "application/json"})
        while not held.done():
            before = time.monotonic()
            assert client.get("/health").status_code == 200
            assert time.monotonic() - before < 3
        response = held.result()
    assert time.monotonic() - start < 10
    assert response.status_code == 422
    assert len(response.content) < 8_000
    problems = response.json()["problems"]
    assert 1 <= len(problems) <= 20
    assert any(problem["field"] == field and message in problem["message"] for problem in problems)


def test_problems_beyond_the_first_twenty_are_counted(client):
    for inputs in ([{"a": 1}] * 32, [{"text": " "}] * 32):  # of the schema, and of the task
        failure = client.post("/v1/predict", json={"model": "lora", "inputs": inputs}).json()
        assert len(failure["problems"]) == 20
        assert failure["message"].endswith("problems more")


def test_half_a_header_is_dropped(client):
    """Connections that send nothing or half a header end; one that is used for as long does not."""
    starts = [b"", b"GET /health", b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\n"] * 20
    with ExitStack() as stack:
        opened = [stack.enter_context(connection(client)) for _ in starts]
        used = stack.enter_context(connection(client))
        for one, start in zip(opened, starts, strict=True):
            one.sendall(start)
        end = time.monotonic() + 1
        while time.monotonic() < end:
            used.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b'{"status":"ok"}'):
                part = used.recv(65_536)
                assert part
                answer += part
            time.sleep(0.05)
        assert {received(one) for one in opened} == {""}


def test_half_a_body_is_refused_in_time(client):
    for length in ("Content-Length: 100", "Transfer-Encoding: chunked"):
        with connection(client) as opened:
            head = f"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{length}\r\n\r\n"
            opened.sendall(head.encode() + b'5\r\n{"inp')
            text = received(opened)
            assert text.startswith("HTTP/1.1 408")
            assert "the body didn't arrive in 0.3 s" in text


def test_answers_on_a_kept_connection_come_at_once(client):
    """Without TCP_NODELAY each comes 40 ms late, when the client's delayed acknowledgement is due."""

    def once():
        start = time.monotonic()
        assert client.get("/health").status_code == 200
        return time.monotonic() - start

    assert min(once() for _ in range(20)) < 0.03


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("desk.example:80", 200),
        ("127.0.0.1", 200),
        ("192.168.1.7:8000", 200),
        ("[::1]:8000", 200),
        ("rebound.example", 421),
        ("127.0.0.1.rebound.example", 421),
        ("localhost.rebound.example:8000", 421),
        ("", 421),
        ("x" * 10_000, 421),
    ],
)
def test_the_host_header(client, host, status):
    """A site whose own name was made to point to this address can neither ask nor read."""
    for path in ("/", "/v1/models"):
        response = client.get(path, headers={"Host": host})
        assert response.status_code == status
        assert len(response.content) < 500 or status == 200
    assert client.post("/v1/predict", json=BODY, headers={"Host": host}).status_code == status


def test_any_host_with_keys_or_a_star(hosted):
    for options in ({"keys": ["the-key"]}, {"allowed_hosts": ["*"]}):
        with serving({"lora": hosted["lora"]}, **options) as client:
            headers = {"Host": "desk.somewhere", "Authorization": "Bearer the-key"}
            assert client.post("/v1/predict", json=BODY, headers=headers).status_code == 200


@pytest.mark.parametrize(("grace", "signals", "status"), [(0.5, 1, 0), (600, 2, -signal.SIGTERM)])
def test_half_a_body_does_not_keep_the_server(grace, signals, status):
    """SIGTERM ends it after the grace that it was given, and a second one at once."""
    with bind("127.0.0.1", 0) as port:
        port.listen()
        process = get_context("fork").Process(target=stopped_alone, args=(port, grace))
        process.start()
        address = port.getsockname()
    with socket.create_connection(address, timeout=10) as opened:
        opened.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 9\r\n")
        opened.sendall(b"Content-Type: application/json\r\n\r\n{")
        assert b"100" in opened.recv(100)  # it waits for the rest
        for _ in range(signals):
            assert process.is_alive()
            os.kill(process.pid, signal.SIGTERM)
            process.join(0.3)
        process.join(10)
        assert process.exitcode == status


def stopped_alone(port, grace):
    run_server(create_app({}, SETTINGS), port, grace_seconds=grace)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_a_thousand_requests_from_the_schema(client, mode):
    assert fuzzed(client, "/v1/predict", mode, 1000) <= {200, 400, 422}
