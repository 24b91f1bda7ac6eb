"""The averages of a server of stock PEFT, and what is said when a server fails."""

import json
import math
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pandas
import pytest
import torch
from datasets import Dataset

from bloblora.client import DrawClient, ServerError
from bloblora.data import DataError
from bloblora.export import export
from bloblora.runs import RunError
from tests.client.checks import check_choices, check_texts
from tests.client.conftest import SAMPLES, SEED
from tests.tiny_base import QUESTIONS

pytestmark = pytest.mark.usefixtures("one_thread")

GOOD = {"choices": [{"text": "x", "logprobs": {"token_logprobs": [-1.0], "top_logprobs": [{}]}}]}


@pytest.mark.parametrize("task", ["choice_text", "choice_letter", "blank"])
def test_choices_are_those_of_predict(task, exported, peft_url):
    check_choices(exported(task), peft_url(task))


def test_a_lora_on_the_head_is_scored_by_what_is_written(exported, peft_url):
    """vLLM, and the server of this test as it, leave that part out of a prompt's log-probabilities."""
    options = {"target_modules": ["q_proj", "lm_head"]}
    case, url = exported("choice_text", **options), peft_url("choice_text", **options)
    check_choices(case, url)
    client = DrawClient(case.folder, url)
    assert client.manifest.on_head
    assert any("its issue 51594" in warning for warning in client.manifest.warnings)
    client.manifest = replace(client.manifest, on_head=False)  # by echo, which is wrong
    expected = case.run.predict(case.records, SAMPLES, SEED).draw_probabilities
    assert (client.predict(case.records).draw_probabilities - expected).abs().max() > 1e-3


def test_letters_among_the_most_probable_tokens(exported, peft_url):
    check_choices(exported("choice_letter"), peft_url("choice_letter"), top_logprobs=400)
    with pytest.raises(ServerError, match=r"model 'draw_0\d': ' [A-C]' isn't among the 1 most probable tokens"):
        DrawClient(exported("choice_letter").folder, peft_url("choice_letter"), top_logprobs=1).predict(QUESTIONS)


def test_a_server_a_draw(exported, peft_url):
    case, url = exported("choice_text"), peft_url("choice_text")
    check_choices(case, {name: url for name in ("draw_00", "draw_01", "draw_02")})
    with pytest.raises(ValueError, match="base_url: no URL for draw_01, draw_02; give one for each of draw_00"):
        DrawClient(case.folder, {"draw_00": url})


@pytest.mark.filterwarnings("ignore:temperature_scaling:UserWarning")
def test_the_manifests_temperature_divides(exported, peft_url):
    case = exported("choice_text", temperature_scaling=True, validation=0.5)
    assert case.run.sampler.temperature != 1
    url = peft_url("choice_text", temperature_scaling=True, validation=0.5)
    expected = case.run.predict(case.records, SAMPLES, SEED)
    found = DrawClient(case.folder, url).predict(case.records)
    tolerance = 2e-5 * max(1, 1 / case.run.sampler.temperature)
    torch.testing.assert_close(found.draw_probabilities, expected.draw_probabilities, rtol=0, atol=tolerance)


def test_texts_are_those_of_generate(exported, peft_url):
    check_texts(exported("generation"), peft_url("generation"))


def test_an_unknown_model_is_named(exported, peft_url, tmp_path):
    """A server that was started for another export."""
    case = exported("choice_text")
    export(case.run.config.output, tmp_path / "more", num_samples=4)
    with pytest.raises(ServerError, match=r"model 'draw_03': status 404: .*; serve each draw by its name in manifest"):
        DrawClient(tmp_path / "more", peft_url("choice_text")).predict(QUESTIONS)


def test_what_a_server_cannot_score(exported, tmp_path):
    url = "http://127.0.0.1:9/v1"
    with pytest.raises(ValueError, match="task is generation, which has no choices for a server to score"):
        DrawClient(exported("generation").folder, url).predict(QUESTIONS)
    with pytest.raises(ValueError, match="task is choice_text, which writes no text"):
        DrawClient(exported("choice_text").folder, url).generate([{"prompt": "x"}])
    with pytest.raises(ValueError, match="task choice_text can't be scored by top_logprobs; leave it out"):
        DrawClient(exported("choice_text").folder, url, top_logprobs=20).predict(QUESTIONS)
    with pytest.raises(RunError, match=r"manifest.json: not readable"):
        DrawClient(tmp_path, url)


@contextmanager
def replying(*replies):
    """A server that sends these, (status, headers, body), the last one for ever; yields its URL and the requests."""
    left, seen = list(replies), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append((self.headers, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            status, headers, body = left.pop(0) if len(left) > 1 else left[0]
            time.sleep(float(headers.get("Slow", 0)))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(BrokenPipeError):  # a client that didn't wait
                self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


def completed(logprobs, text="x"):
    return 200, {}, {"choices": [{"text": text, "logprobs": logprobs}]}


def ask(case, url, **options):
    return DrawClient(case.folder, url, concurrency=1, **options).generate([{"prompt": "x"}])


@pytest.mark.parametrize("key", ["abc\n", " abc\r\n"])
def test_a_key_without_the_white_space_around_it(key, exported):
    """As a file gives it that ends with a line break."""
    with replying((200, {}, GOOD)) as (url, seen):
        ask(exported("generation"), url, api_key=key)
    assert {headers["Authorization"] for headers, _ in seen} == {"Bearer abc"}


@pytest.mark.parametrize("key", ["secret\nX-Header: 1", "secretschlüssel", "secret key"])
def test_a_key_that_no_header_can_carry_is_not_quoted(key, exported):
    with pytest.raises(ValueError, match="api_key: has characters other than visible ASCII") as raised:
        ask(exported("generation"), "http://127.0.0.1:9/v1", api_key=key)
    assert "secret" not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "http://localhost:abc/v1"}, r"base_url: 'http://localhost:abc/v1' is no URL \(Invalid port"),
        ({"base_url": "http://bü..cher/v1"}, r"base_url: 'http://bü..cher/v1' is no URL .*must be like http://local"),
        ({"retries": -1}, "retries must be 0 or more, got -1"),
        ({"concurrency": 0}, "concurrency must be 1 or more, got 0"),
    ],
)
def test_options_out_of_range(options, message, exported):
    with pytest.raises(ValueError, match=message):
        DrawClient(exported("generation").folder, **{"base_url": "http://127.0.0.1:9/v1", **options})


def test_records_are_taken_as_a_run_takes_them(exported, peft_url):
    case, url = exported("choice_text"), peft_url("choice_text")
    client = DrawClient(case.folder, url)
    expected = client.predict(case.records)
    for source in (pandas.DataFrame(case.records), iter(case.records), Dataset.from_list(case.records)):
        assert torch.equal(client.predict(source).log_probs, expected.log_probs)
    one = client.predict(case.records[0]).probabilities
    torch.testing.assert_close(one[0], expected.probabilities[0, : one.shape[1]])
    with pytest.raises(ValueError, match="records: there is nothing to predict"):
        client.predict([])
    with pytest.raises(DataError, match="row 1: field 'choices': missing"):
        client.predict([{"question": "x"}])
    with replying((200, {}, GOOD)) as (url, seen):
        assert DrawClient(exported("generation").folder, url).generate("a prompt").texts == [["x"] * SAMPLES]
    assert len(seen) == SAMPLES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 2, "stream": True}, "options: n, stream can't be among them"),
        ({"prompt": "x", "model": "y", "max_tokens": 9}, "options: max_tokens, model, prompt can't be among them"),
        ({"max_new_tokens": 0}, "max_new_tokens must be from 1 to below 256, got 0"),
        ({"max_new_tokens": 256}, "max_new_tokens must be from 1 to below 256, got 256"),
    ],
)
def test_what_no_draw_can_write(options, message, exported):
    with pytest.raises(ValueError, match=message):
        DrawClient(exported("generation").folder, "http://127.0.0.1:9/v1").generate("a", **options)


def test_a_long_prompt_leaves_room_for_the_answer(exported):
    with replying((200, {}, GOOD)) as (url, seen):
        DrawClient(exported("generation").folder, url).generate("card " * 400, max_new_tokens=56)
    assert {len(body["prompt"]) for _, body in seen} == {200}
    message, reply = r"model 'draw_0\d': a log-probability is NaN", completed({"token_logprobs": [math.nan]})
    with replying(reply) as (url, _), pytest.raises(ServerError, match=message):
        ask(exported("generation"), url)


@pytest.mark.parametrize(("number", "shown"), [(math.nan, "nan"), (-math.inf, "-inf"), (math.inf, "inf")])
def test_log_probabilities_that_are_no_distribution(number, shown, exported):
    tops = [{f"token_id:{token}": number for token in range(400)}]
    reply = completed({"token_logprobs": [-1.0], "top_logprobs": tops})
    with replying(reply) as (url, _):
        client = DrawClient(exported("choice_letter").folder, url, top_logprobs=20)
        message = rf"{url}, model 'draw_0\d': the log-probabilities of a record's choices are \[{shown}, "
        with pytest.raises(ServerError, match=message):
            client.predict(QUESTIONS)


@pytest.mark.parametrize("wait", ["nan", "Wed, 21 Oct 2026 07:28:00 GMT"])
def test_a_wait_that_is_no_number(wait, exported):
    with replying((429, {"Retry-After": wait}, b""), (200, {}, GOOD)) as (url, seen):
        assert ask(exported("generation"), url).texts == [["x"] * SAMPLES]
    assert len(seen) == SAMPLES + 1


def test_neither_torch_nor_transformers_is_imported_with_it():
    program = "import sys, bloblora.client; sys.exit(any(n in sys.modules for n in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_busy_server_is_asked_again(exported):
    busy = (429, {"Retry-After": "0.2"}, b"")
    with replying(busy, (503, {"Retry-After": "0"}, b""), (200, {}, GOOD)) as (url, seen):
        start = time.monotonic()
        assert ask(exported("generation"), url, api_key="the-key").texts == [["x"] * 3]
        assert time.monotonic() - start >= 0.2
        assert [body["model"] for _, body in seen] == ["draw_00"] * 3 + ["draw_01", "draw_02"]
        assert {headers["Authorization"] for headers, _ in seen} == {"Bearer the-key"}
    with (
        replying((429, {"Retry-After": "0"}, b"slow down")) as (url, seen),
        pytest.raises(ServerError, match="status 429: slow down; still so after 2 retries: lower concurrency"),
    ):
        ask(exported("generation"), url, retries=2)
    assert [body["model"] for _, body in seen].count("draw_00") == 3


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((200, {}, {"choices": [{"text": "x", "logprobs": None}]}), "the answer has no log-probabilities"),
        ((200, {}, {"choices": [{"text": "x"}]}), "the answer has no log-probabilities although 'logprobs'"),
        ((200, {}, {"choices": []}), r'not a completion: \{"choices": \[\]\}'),
        ((200, {}, b"<html>"), "not a completion: <html>"),
        ((200, {}, [1]), r"not a completion: \[1\]"),
        (completed([1]), "not a completion"),
        (completed({"token_logprobs": [-1.0, None]}), "not a completion"),
        (completed({"token_logprobs": -1.0}), "not a completion"),
        (completed({"token_logprobs": [-1.0], "top_logprobs": [[1]]}), "not a completion"),
        (completed({"content": [{"logprob": -1.0, "top_logprobs": [{"logprob": -1.0}]}]}), "not a completion"),
        (completed({"content": [{"token": "x"}]}), "not a completion"),
        (completed(None, text=None), "not a completion"),
        ((401, {}, b"who are you"), "status 401: who are you"),
        ((200, {"Slow": "2"}, GOOD), "no answer in 0.3 s; give a longer timeout"),
    ],
)
def test_an_answer_that_cannot_be_used(reply, message, exported):
    with replying(reply) as (url, _), pytest.raises(ServerError, match=rf"{url}, model 'draw_00': {message}"):
        ask(exported("generation"), url, timeout=0.3)


def test_a_prompt_that_is_read_otherwise(exported):
    with replying((200, {}, GOOD)) as (url, _), pytest.raises(ServerError, match="1 log-probabilities for a prompt of"):
        DrawClient(exported("choice_text").folder, url).predict(QUESTIONS)


@pytest.mark.parametrize("top", [None, [], [None]], ids=str)
def test_no_next_tokens(top, exported):
    reply = completed({"token_logprobs": [-1.0], "top_logprobs": top})
    with replying(reply) as (url, _), pytest.raises(ServerError, match="isn't among the 0 most probable tokens"):
        DrawClient(exported("choice_letter").folder, url, top_logprobs=5).predict(QUESTIONS)


def test_nobody_there(exported):
    with pytest.raises(ServerError, match=r"127.0.0.1:9/v1, model 'draw_00': .*; is the server up"):
        ask(exported("generation"), "http://127.0.0.1:9/v1")
