"""Text over HTTP, asked with OpenAI's own client."""

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from bloblora import runs
from bloblora.generation import find_agree
from bloblora.generation.asking import question_length
from bloblora.runs.texts import WritingOptions
from bloblora.serving import load_hosted, open_hosted
from bloblora.serving.completions import _Text
from bloblora.serving.schema import OPENAI_PATHS
from bloblora.serving.writing import Token, Way, Writing, write
from tests.generation.conftest import RECORDS
from tests.serving.conftest import TEXT_SETTINGS, serving
from tests.serving.test_schema import fuzzed
from tests.tiny_base import write_signed

openai = pytest.importorskip("openai")

PROMPT, OTHER = (record["prompt"] for record in RECORDS)
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
BAD, LONG = "BadRequestError", "context_length_exceeded"


@pytest.fixture(scope="module")
def hosted(writer_folder, folders):
    loaded = load_hosted(open_hosted([writer_folder, folders["desk"]], TEXT_SETTINGS), TEXT_SETTINGS)
    loaded["answers"].run.tokenizer.chat_template = TEMPLATE
    return loaded


@pytest.fixture(scope="module")
def server(hosted):
    with serving(hosted, TEXT_SETTINGS) as client:
        yield client


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


def client_of(server, key="none"):
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def expected(hosted):
    """What the run itself says."""
    run = hosted["answers"].run
    return {
        prompt: next(run.describe_texts([{"prompt": prompt}], 3, max_new_tokens=16, do_sample=False, draws=True))
        for prompt in (PROMPT, OTHER)
    }


def test_a_completion_is_what_generate_writes(client, expected):
    found = client.completions.create(model="answers", prompt=[PROMPT, OTHER], logprobs=2)
    assert (found.object, found.model) == ("text_completion", "answers")
    assert [choice.text for choice in found.choices] == [line["answer"] for line in expected.values()]
    assert [choice.finish_reason for choice in found.choices] == ["stop", "stop"]
    for choice, line in zip(found.choices, expected.values(), strict=True):
        tokens = line["tokens"]
        assert choice.logprobs.tokens == tokens["texts"][:-1]  # without the end of the text
        assert choice.logprobs.token_logprobs == pytest.approx(tokens["log_probabilities"][:-1], abs=1e-4)
        assert "".join(choice.logprobs.tokens) == choice.text
        assert choice.logprobs.text_offset[0] == 0
        for name, value, top in zip(
            choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
        ):
            assert len(top) == 2
            assert top[name] == pytest.approx(value, abs=1e-5) == max(top.values())  # the most probable was taken
        assert choice.tokens["mutual_information"] == pytest.approx(tokens["mutual_information"][:-1], abs=1e-4)
        assert choice.uncertainty["sequence_log_probability"] == pytest.approx(
            line["sequence_log_probability"], abs=1e-3
        )
        assert 0 < choice.p_correct < 1
        assert choice.abstain is False
        assert choice.answer_set == [choice.text]
        assert choice.promises["answering"].startswith("at most 0.7 of the answered are wrong")
    lengths = sum(len(line["tokens"]["ids"]) for line in expected.values())
    assert found.usage.completion_tokens == lengths
    assert found.usage.total_tokens == found.usage.prompt_tokens + lengths


def test_the_answers_of_the_draws(client, expected):
    asked = {"model": "answers", "prompt": [PROMPT, OTHER]}
    found = client.completions.create(**asked, extra_body={"draws": True})
    for choice, line in zip(found.choices, expected.values(), strict=True):
        assert choice.text == line["answer"]
        assert choice.draws == line["draws"]
        assert choice.uncertainty["agreement"] == pytest.approx(line["agreement"])
        assert 0 < choice.p_correct < 1
    stopped = client.completions.create(**asked, stop="o", extra_body={"draws": True})
    for choice, line in zip(stopped.choices, expected.values(), strict=True):
        assert choice.draws == [text.split("o")[0] for text in line["draws"]]
    *_, last = client.completions.create(model="answers", prompt=PROMPT, stream=True, extra_body={"draws": True})
    assert last.choices[0].draws == expected[PROMPT]["draws"]
    without = client.completions.create(model="answers", prompt=PROMPT).choices[0]
    assert not hasattr(without, "draws")


def test_sampled_answers_and_p_true(client, hosted):
    asked = {"model": "answers", "prompt": [PROMPT, OTHER]}
    own = {"answers": 4, "answer_temperature": 1.5, "p_true": True, "agree": "exact"}
    found = client.completions.create(**asked, extra_body=own)
    how = {"max_new_tokens": 16, "do_sample": False, **own, "agree": find_agree("exact")}
    for choice, prompt in zip(found.choices, (PROMPT, OTHER), strict=True):
        line = next(hosted["answers"].run.describe_texts([{"prompt": prompt}], 3, **how))
        assert choice.sampled == line["sampled"]
        assert choice.text == line["answer"]
        for name in ("semantic_entropy", "discrete_semantic_entropy", "p_true"):
            assert choice.uncertainty[name] == pytest.approx(line[name], abs=1e-4)
        assert not hasattr(choice, "p_correct")  # the map is for answers alone
    stopped = client.completions.create(**asked, stop="o", extra_body={"answers": 2})
    assert all("o" not in text for choice in stopped.choices for text in choice.sampled)
    without = client.completions.create(model="answers", prompt=PROMPT).choices[0]
    assert not hasattr(without, "sampled")
    assert "p_true" not in without.uncertainty


def test_a_stream_is_the_same_answer_in_parts(client):
    whole = client.completions.create(model="answers", prompt=PROMPT, logprobs=0).choices[0]
    events = [
        *client.completions.create(
            model="answers", prompt=PROMPT, logprobs=0, stream=True, stream_options={"include_usage": True}
        )
    ]
    *parts, usage = events
    assert usage.choices == []
    assert usage.usage.completion_tokens == len(whole.logprobs.tokens) + 1
    assert len(parts) == len(whole.logprobs.tokens) + 1
    assert "".join(part.choices[0].text for part in parts) == whole.text
    assert [part.choices[0].finish_reason for part in parts] == [None] * (len(parts) - 1) + ["stop"]
    log_probs = [value for part in parts for value in part.choices[0].logprobs.token_logprobs]
    assert log_probs == pytest.approx(whole.logprobs.token_logprobs, abs=1e-4)
    assert parts[-1].choices[0].p_correct == pytest.approx(whole.p_correct, abs=1e-4)


def test_the_mean_writes_and_the_draws_read(client, hosted):
    """What they say of the tokens comes with a stream's last event; where they write, with each token."""
    run, asked, close = hosted["answers"].run, {"model": "answers", "prompt": OTHER, "max_tokens": 8}, {"abs": 1e-4}
    run.sampler.scalable.scale_(500.0)  # so that they disagree
    try:
        line = next(run.describe_texts([{"prompt": OTHER}], 3, max_new_tokens=8, do_sample=False))["tokens"]
        whole, average = (
            client.completions.create(**asked, extra_body={"decoding": name}).choices[0] for name in ("mean", "average")
        )
        parts, others = (
            [part.choices[0] for part in client.completions.create(**asked, stream=True, extra_body={"decoding": name})]
            for name in ("mean", "average")
        )
    finally:
        run.sampler.scalable.scale_(1 / 500.0)
    for name in ("log_probabilities", "mutual_information"):
        assert whole.tokens[name] == pytest.approx(line[name][: len(whole.tokens["texts"])], **close)
        assert parts[-1].read[name] == pytest.approx(line[name], **close)
        assert not hasattr(whole, "read")
    assert {value for part in parts for value in part.tokens["mutual_information"]} == {None}
    streamed = [value for part in others for value in part.tokens["mutual_information"]]
    assert streamed == pytest.approx(average.tokens["mutual_information"], **close)
    assert min(max(streamed), max(line["mutual_information"])) > 0.01


def test_stops_and_log_probabilities_share_a_batch(hosted):
    """Of one length or not, each answer is cut by its own stop alone and is as if it were alone."""
    run, sent = hosted["answers"].run, [[] for _ in range(4)]
    asked = [(PROMPT, ("xide",), 0), (OTHER, (), 2), (PROMPT, (), 1), ("?", ("e", "zz"), 0)]
    how = Way("answers", 3, 0, WritingOptions(max_new_tokens=16))

    def writing(number):
        prompt, stop, top = asked[number]
        example = hosted["answers"].encode({"prompt": prompt})
        return Writing(example, sent[number].append, threading.Event(), stop, top)

    rules = hosted["answers"].rules_for(how)
    ends = write(run, how, [writing(number) for number in range(4)], rules)
    together = [[*tokens] for tokens in sent]
    for number, (_, stop, top) in enumerate(asked):
        sent[number].clear()
        (alone,) = write(run, how, [writing(number)], rules)
        assert [token.id for token in together[number]] == [token.id for token in sent[number]]
        assert all(len(token.top) == top for token in together[number])
        assert ends[number]["finish_reason"] == alone["finish_reason"]
        assert ends[number]["uncertainty"] == pytest.approx(alone["uncertainty"], abs=1e-3)
        assert ("p_correct" in ends[number]) == ("p_correct" in alone) == (not stop)
    assert len(together[0]) < len(together[2])


def test_an_answer_may_end_where_the_base_ends_it(hosted, monkeypatch):
    run, how = hosted["answers"].run, Way("answers", 3, 0, WritingOptions(max_new_tokens=2))
    writing = Writing(hosted["answers"].encode({"prompt": PROMPT}), lambda token: None, threading.Event())
    (token,) = run.generate_encoded([writing.example], 3, max_new_tokens=2, do_sample=False).tokens[:, 1].tolist()
    assert write(run, how, [writing], None)[0]["finish_reason"] == "length"
    monkeypatch.setattr(run.model.generation_config, "eos_token_id", [token])
    assert write(run, how, [writing], None)[0]["finish_reason"] == "stop"


def test_a_chat(client, hosted):
    messages = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Which gas"}, {"type": "text", "text": "?"}]},
    ]
    options = dict(model="answers", messages=messages, max_completion_tokens=8, extra_body={"decoding": "average"})
    found = client.chat.completions.create(**options, logprobs=True, top_logprobs=3)
    record = {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Which gas?"}]}
    how = dict(max_new_tokens=8, do_sample=False, decoding="average")
    line = next(hosted["answers"].run.describe_texts([record], 3, **how))
    choice = found.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", line["answer"])
    entries = choice.logprobs.content
    assert "".join(entry.token for entry in entries) == line["answer"]
    assert [entry.logprob for entry in entries] == pytest.approx(
        line["tokens"]["log_probabilities"][: len(entries)], abs=1e-4
    )
    assert all(bytes(entry.bytes).decode() == entry.token and len(entry.top_logprobs) == 3 for entry in entries)
    assert not hasattr(choice, "p_correct")  # the map is for answers of up to 16 tokens
    with client.chat.completions.stream(**options) as stream:
        assert stream.get_final_completion().choices[0].message.content == line["answer"]


def test_a_part_of_a_character_has_no_bytes(client, hosted):
    """Its text is a replacement character, whose bytes would be another character's."""
    asked = {"model": "answers", "messages": [{"role": "user", "content": "?"}], "max_tokens": 30, "temperature": 2.0}
    found = (client.chat.completions.create(**asked, seed=seed, logprobs=True).choices[0] for seed in range(20))
    entries = [entry for choice in found for entry in choice.logprobs.content]
    parts = [entry for entry in entries if "\N{REPLACEMENT CHARACTER}" in entry.token]
    assert parts
    assert all(entry.bytes is None for entry in parts)
    assert all(bytes(entry.bytes).decode() == entry.token for entry in entries if entry not in parts)


def test_a_chat_goes_on_with_the_message_that_was_answered(client, hosted):
    """As the client gives it back, or as its dict, which has more fields; an answer may be empty."""
    ask, messages = client.chat.completions.create, [{"role": "user", "content": "Which gas?"}]
    message = ask(model="answers", messages=messages, max_tokens=4).choices[0].message
    records = [*messages, {"role": "assistant", "content": message.content}, *messages]
    how = {"max_new_tokens": 4, "do_sample": False}
    expected = hosted["answers"].run.generate([{"messages": records}], 3, **how).texts[0]
    nulls = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls"))
    for answered in (message, message.model_dump(), {"role": "assistant", "content": message.content} | nulls):
        found = ask(model="answers", messages=[*messages, answered, *messages], max_tokens=4)
        assert found.choices[0].message.content == expected
    empty = [{"role": "system", "content": ""}, *messages, {"role": "assistant", "content": ""}, *messages]
    found = ask(model="answers", messages=empty, max_tokens=4)
    expected = hosted["answers"].run.generate([{"messages": empty}], 3, **how).texts[0]
    assert found.choices[0].message.content == expected


def test_fields_that_change_nothing(client):
    messages = [{"role": "user", "content": "Which gas?"}]
    plain = client.chat.completions.create(model="answers", messages=messages, max_tokens=4)
    named = [messages[0] | {"name": "Ada"}]
    same = {"store": False, "response_format": {"type": "text"}}
    found = client.chat.completions.create(model="answers", messages=named, max_tokens=4, **same)
    assert found.choices[0].message == plain.choices[0].message
    asked = {"model": "answers", "prompt": PROMPT, "max_tokens": 4}
    plain, found = (
        client.completions.create(**asked, **more).choices[0] for more in ({}, {"echo": False, "best_of": 1})
    )
    assert found.text == plain.text


def test_a_prompt_has_the_room_that_generate_gives_it(client, hosted, monkeypatch):
    """With its answer up to what the model reads, alone up to what the task takes; beyond that `generate` cuts it."""
    run = hosted["answers"].run
    length = len(run.tokenizer(PROMPT)["input_ids"])
    monkeypatch.setattr(run, "task", replace(run.task, max_length=length + 1))  # less than prompt and answer
    asked = {"model": "answers", "prompt": PROMPT}
    how = {"max_new_tokens": 8, "do_sample": False}
    found = client.completions.create(**asked, max_tokens=8).choices[0].text
    assert found == run.generate([{"prompt": PROMPT}], 3, **how).texts[0]
    with pytest.raises(
        openai.BadRequestError, match=f"{length + 1} tokens.* must be at most {length}: the run was"
    ) as cut:
        client.completions.create(**asked | {"prompt": PROMPT + "a"}, max_tokens=8)
    assert cut.value.code == LONG
    for p_true in (False, True):
        more = 8 + (question_length(run.tokenizer) if p_true else 0)
        monkeypatch.setattr(run.tokenizer, "model_max_length", length + more)
        client.completions.create(**asked, max_tokens=8, extra_body={"p_true": p_true})
        with pytest.raises(openai.BadRequestError, match=f"at most {length + more}, which the model reads") as cut:
            client.completions.create(**asked, max_tokens=9, extra_body={"p_true": p_true})
        assert cut.value.code == LONG


def test_sampling_and_limits(client, hosted):
    options = dict(model="answers", prompt="Which sand?", temperature=2.0, top_p=0.9, max_tokens=5)
    one, again, other = (client.completions.create(**options, seed=seed).choices[0] for seed in (1, 1, 2))
    run = hosted["answers"].run
    how = dict(do_sample=True, temperature=2.0, top_p=0.9, top_k=0, max_new_tokens=5)
    assert one.text == again.text == run.generate([{"prompt": "Which sand?"}], 3, 1, **how).texts[0]
    assert other.text == run.generate([{"prompt": "Which sand?"}], 3, 2, **how).texts[0] != one.text
    whole = client.completions.create(model="answers", prompt=PROMPT)
    for stream in (False, True):
        found = client.completions.create(model="answers", prompt=PROMPT, stop=["xide", "zz"], stream=stream)
        parts = [part.choices[0] for part in found] if stream else found.choices
        assert "".join(part.text for part in parts) == whole.choices[0].text.partition("xide")[0] != ""
        assert parts[-1].finish_reason == "stop"
        assert not hasattr(parts[-1], "p_correct")  # of a text that was cut nothing is known
    short = client.completions.create(model="answers", prompt=PROMPT, max_tokens=2, extra_body={"samples": 0})
    assert short.choices[0].finish_reason == "length"
    assert short.usage.completion_tokens == 2


def test_models(client, server):
    assert [model.id for model in client.models.list()] == ["answers"]
    assert client.models.retrieve("answers").owned_by == "bloblora"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("desk")
    answers = server.get("/v1/models").json()["models"][0]
    assert (answers["kind"], answers["labels"]) == ("prompt", None)
    assert answers["promises"].keys() == {"answering", "answer_sets"}
    assert answers["examples"][0] == {"prompt": "Which gas do plants take in?"}


@pytest.mark.parametrize(
    ("fields", "error", "param", "code", "message"),
    [
        (
            {"prompt": "where is it " * 100},
            BAD,
            "prompt",
            "context_length_exceeded",
            "at most 200 tokens",
        ),
        ({"prompt": "x" * 9999}, BAD, "prompt", LONG, "at most 3200 characters"),
        ({"prompt": ""}, BAD, "prompt", None, "at least 1 character"),
        ({"prompt": [" "]}, BAD, "prompt[0]", None, "must be a text that isn't empty"),
        ({"model": "nobody"}, "NotFoundError", "model", "model_not_found", "must be one of answers"),
        ({"model": "desk"}, "NotFoundError", "model", "model_not_found", "writes no text"),
        ({"max_tokens": 61}, BAD, "max_tokens", None, "must be at most 60"),
        ({"max_tokens": 0}, BAD, "max_tokens", None, "greater than or equal to 1"),
        ({"temperature": -1}, BAD, "temperature", None, "greater than or equal to 0"),
        ({"stop": "x" * 900_000}, BAD, "stop", None, "at most 200 characters"),  # its prefixes would need 400 GB
        ({"stop": ["a", "x" * 201]}, BAD, "stop[1]", None, "at most 200 characters"),
        ({"n": 2}, BAD, "n", None, "less than or equal to 1"),
        ({"logit_bias": {"5": 1}}, BAD, "logit_bias", None, "is no field; the fields are model, "),
        ({"extra_body": {"samples": 21}}, BAD, "samples", None, "must be at most 20"),
        ({"extra_body": {"answers": 21}}, BAD, "answers", None, "must be at most 20"),
        ({"extra_body": {"agree": "nli:x"}}, BAD, "agree", None, "'exact', 'normalized' or 'numeric'"),
        ({"messages": []}, BAD, "messages", None, "at least 1 item"),
        ({"messages": [{"role": "user", "content": ""}]}, BAD, "messages[0].content", None, "a text that isn't empty"),
        ({"echo": True}, BAD, "echo", None, "Input should be False"),
        ({"best_of": 2}, BAD, "best_of", None, "less than or equal to 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "x"}] * 33}]},
            BAD,
            "messages[0].content",
            None,
            "33 of them; must be at most 32",
        ),
        (
            {"messages": [{"role": "assistant", "content": "no"}]},
            BAD,
            "messages[0].role",
            None,
            "answers",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2},
            BAD,
            "top_logprobs",
            None,
            "no effect without logprobs",
        ),
        ({"stream_options": {"include_usage": True}}, BAD, "stream_options", None, "no effect without stream"),
        ({"extra_body": {"answer_temperature": 0.5}}, BAD, "answer_temperature", None, "no effect without answers"),
        ({"extra_body": {"agree": "exact", "answers": 0}}, BAD, "agree", None, "no effect without answers or draws"),
        ({"top_p": 0.5}, BAD, "top_p", None, "no effect without temperature"),
        ({"top_p": 0.5, "temperature": 0}, BAD, "top_p", None, "no effect without temperature"),
        ({"temperature": 1e-38}, BAD, "temperature", None, "must be at least 1e-06 where it isn't 0"),
        (
            {"extra_body": {"answers": 2, "answer_temperature": 1e-38}},
            BAD,
            "answer_temperature",
            None,
            "must be at least 1e-06",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}], "max_tokens": 9, "max_completion_tokens": 2},
            BAD,
            "max_tokens",
            None,
            "must be max_completion_tokens, 2, or left out",
        ),
    ],
)
def test_what_is_refused(client, fields, error, param, code, message):
    create = client.chat.completions.create if "messages" in fields else client.completions.create
    usual = {"model": "answers"} | ({} if "messages" in fields else {"prompt": PROMPT})
    with pytest.raises(getattr(openai, error), match=message) as raised:
        create(**{**usual, **fields})
    body = raised.value.body
    assert (body["type"], body["param"], body["code"]) == ("invalid_request_error", param, code)


@pytest.mark.parametrize("path", OPENAI_PATHS)
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_fuzzed(server, path, mode):
    assert fuzzed(server, path, mode, 10) <= {200, 400, 404}


@pytest.mark.long
@pytest.mark.parametrize("path", OPENAI_PATHS)
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_fuzzed_again_and_again(server, path, mode):
    assert fuzzed(server, path, mode, 500) <= {200, 400, 404}


def test_options_that_the_rules_or_the_draws_use_are_taken(client, hosted, monkeypatch):
    """Without them there would be no p_correct, where the map is for answers that agree so."""
    asked = {"model": "answers", "prompt": PROMPT, "max_tokens": 4}
    assert client.completions.create(**asked, extra_body={"agree": "exact", "draws": True}).choices[0].draws
    (rules,) = hosted["answers"].rules
    how = rules.how | {"agree": "exact"}
    monkeypatch.setattr(hosted["answers"], "rules", [replace(rules, how=how)])
    found = client.completions.create(model="answers", prompt=PROMPT, top_p=1, extra_body={"agree": "exact"})
    assert 0 < found.choices[0].p_correct < 1


def test_the_most_probable_of_tokens_with_one_text_is_named(client):
    """As of the parts of characters, all of which are a replacement character."""
    asked = {"model": "answers", "prompt": "?", "max_tokens": 30, "temperature": 2.0, "logprobs": 5}
    fewer = 0
    for seed in range(10):
        found = client.completions.create(**asked, seed=seed).choices[0].logprobs
        for top in found.top_logprobs:
            assert [*top.values()] == sorted(top.values(), reverse=True)
            fewer += len(top) < 5
    assert fewer


def test_a_token_after_an_invalid_byte_has_its_own_place(hosted):
    tokenizer = hosted["answers"].run.tokenizer
    byte = tokenizer.encode("漢", add_special_tokens=False)[-1]
    ids = [byte, *tokenizer.encode("card漢", add_special_tokens=False)]
    text = _Text(tokenizer, ())
    for token in ids:
        text.add(Token(token, 0.0, None, []))
    starts = [piece.start for piece in text.held]
    assert text.text == "\N{REPLACEMENT CHARACTER}card漢"
    assert starts[:2] == [0, 1]
    assert starts[-3:] == [5, 5, 5]  # bytes of one character


def test_other_refusals_have_the_same_form(hosted, server):
    error = server.post("/v1/completions", content=b"{").json()["error"]
    assert error["param"] == "body"
    assert "send it with the header 'Content-Type: application/json'" in error["message"]
    large = server.post("/v1/chat/completions", content=b" " * (TEXT_SETTINGS.max_body_bytes + 1))
    assert (large.status_code, large.json()["error"]["type"]) == (413, "invalid_request_error")
    with serving(hosted, TEXT_SETTINGS, keys=("right",)) as locked:
        with pytest.raises(openai.AuthenticationError) as raised:
            client_of(locked, "wrong").completions.create(model="answers", prompt=PROMPT)
        assert raised.value.body["code"] == "invalid_api_key"
        assert client_of(locked, "right").completions.create(model="answers", prompt=PROMPT).choices[0].text
    response = server.post("/v1/predict", json={"inputs": "where is it", "model": "answers"})
    assert "writes text; ask it at /v1/completions" in response.json()["problems"][0]["message"]


def test_a_character_of_several_tokens_comes_whole(hosted):
    tokenizer = hosted["answers"].run.tokenizer
    ids = tokenizer("a€b")["input_ids"]
    assert len(ids) == 5
    text, pieces = _Text(tokenizer, ["zz"]), []
    for token in ids:
        text.add(Token(token, 0.0, 0.0, []))
        pieces.append(text.take(None))
    assert [new for new, _ in pieces] == ["a", "", "", "€", "b"]
    assert [len(tokens) for _, tokens in pieces] == [1, 0, 0, 3, 1]


@pytest.mark.parametrize(
    ("written", "stop", "finish_reason", "text", "tokens"),
    [
        ("carbon<s> dioxide</s>", [], "stop", "carbon dioxide", "carbon<s> dioxide"),
        ("carbon<s> dioxide<s>", [], "length", "carbon dioxide", "carbon<s> dioxide<s>"),
        ("carbon<s> dioxide", [" dio"], "stop", "carbon", "carbon<s>"),
        ("carbon dio<s>xide", [" dio"], "stop", "carbon", "carbon"),
    ],
)
def test_a_token_without_text_keeps_its_place(written, stop, finish_reason, text, tokens, hosted):
    tokenizer = hosted["answers"].run.tokenizer
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    shown, parts = _Text(tokenizer, stop), []
    for token in ids:
        shown.add(Token(token, 0.0, 0.0, []))
        parts.append(shown.take(None))
    parts.append(shown.take(finish_reason))
    pieces = [piece for _, new in parts for piece in new]
    assert "".join(new for new, _ in parts) == text
    assert "".join(piece.text for piece in pieces) == tokens
    assert [piece.place for piece in pieces] == [*range(len(pieces))]
    assert [piece.token.id for piece in pieces] == ids[: len(pieces)]


def test_special_tokens_in_an_answer_have_their_own_log_probabilities(client, hosted):
    run, special = hosted["answers"].run, "<s>"
    asked = {"prompt": "?", "max_tokens": 30, "temperature": 2.0}
    how = {"max_new_tokens": 30, "do_sample": True, "temperature": 2.0, "top_k": 0}
    lines = ((seed, next(run.describe_texts([{"prompt": "?"}], 3, seed, **how))["tokens"]) for seed in range(50))
    seed, tokens = next((seed, line) for seed, line in lines if special in line["texts"][:-2])
    whole = client.completions.create(model="answers", **asked, seed=seed, logprobs=0).choices[0]
    *_, last = client.completions.create(model="answers", **asked, seed=seed, logprobs=0, stream=True)
    count = len(whole.logprobs.tokens)
    assert count in (len(tokens["texts"]), len(tokens["texts"]) - 1)
    assert whole.logprobs.tokens == whole.tokens["texts"] == tokens["texts"][:count]
    for name in ("log_probabilities", "mutual_information"):
        assert whole.tokens[name] == pytest.approx(tokens[name][:count], abs=1e-4)
        assert last.choices[0].read[name] == pytest.approx(tokens[name], abs=1e-4)


def test_without_a_chat_template_a_chat_is_refused(client, hosted, monkeypatch):
    monkeypatch.setattr(hosted["answers"].run.tokenizer, "chat_template", None)
    with pytest.raises(openai.BadRequestError, match="has no chat template"):
        client.chat.completions.create(model="answers", messages=[{"role": "user", "content": "hello"}])


def test_a_chat_of_nothing_leaves_the_others_of_its_batch_alone(hosted, monkeypatch):
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(hosted["answers"].run.tokenizer, "chat_template", template)
    with serving(hosted, replace(TEXT_SETTINGS, max_wait_ms=500.0)) as server, ThreadPoolExecutor(2) as pool:
        create = client_of(server).chat.completions.create
        asked, nothing = (
            pool.submit(create, model="answers", messages=[{"role": role, "content": "hello"}], max_tokens=2)
            for role in ("user", "system")
        )
        with pytest.raises(openai.BadRequestError, match="chat template makes no token of"):
            nothing.result()
        assert asked.result().choices[0].message.role == "assistant"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_the_generation(stream, hosted, server, monkeypatch):
    """Of 60 tokens no more than a few are written; the next client has the thread."""
    run, steps, left = hosted["answers"].run, [], threading.Event()
    generate = run.generate_encoded

    def slow(examples, *args, on_token, **options):
        def told(rows, step):
            steps.append(1)
            on_token(rows, step)
            left.wait(5 if len(steps) == 8 else 0)
            time.sleep(0.05)

        return generate(examples, *args, on_token=told, **options)

    body = {"model": "answers", "prompt": "?", "max_tokens": 60, "temperature": 2, "stream": stream}
    whole = server.post("/v1/completions", json={**body, "stream": False}).json()
    assert whole["usage"]["completion_tokens"] > 30
    monkeypatch.setattr(run, "generate_encoded", slow)
    if stream:
        with server.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            server.post("/v1/completions", json=body, timeout=1)
    left.set()
    for _ in range(100):
        before = len(steps)
        time.sleep(0.3)
        if len(steps) == before:
            break
    assert 1 <= len(steps) < 30


@pytest.mark.parametrize("stream", [True, False])
def test_what_is_open_when_the_grace_is_over_ends_with_an_error(stream, hosted, monkeypatch, capfd):
    run, told, go = hosted["answers"].run, threading.Event(), threading.Event()
    generate = run.generate_encoded

    def held(examples, *args, on_token, **options):
        def tell(rows, step):
            on_token(rows, step)
            told.set()
            assert go.wait(30)

        return generate(examples, *args, on_token=tell, **options)

    monkeypatch.setattr(run, "generate_encoded", held)
    body = {"model": "answers", "prompt": PROMPT, "stream": stream}
    with serving(hosted, TEXT_SETTINGS, grace_seconds=1.0) as server, ThreadPoolExecutor(1) as pool:
        try:
            asked = pool.submit(server.post, "/v1/completions", json=body)
            assert told.wait(30)
            server.server.handle_exit(15, None)
            response = asked.result()
        finally:
            go.set()
    lines = [line for line in response.text.splitlines() if line] if stream else [response.text]
    assert len(lines) == 1 + stream  # of the token that was written
    error = {"message": "the server has stopped before the answer was complete", "type": "server_error"}
    assert json.loads(lines[-1].removeprefix("data: ")) == {"error": {**error, "param": None, "code": None}}
    assert response.status_code == (200 if stream else 503)
    assert "Traceback" not in capfd.readouterr().err


def test_rules_that_do_not_fit_are_found_before_the_model_is_loaded(writer_folder, tmp_path):
    place = Path(shutil.copytree(writer_folder, tmp_path / "answers"))
    with pytest.raises(runs.RunError, match="writes text, which can't be approximated"):
        open_hosted([str(place)], replace(TEXT_SETTINGS, approximate="mirrored"))
    stored = json.loads((place / "correctness.json").read_text())
    write_signed(place / "correctness.json", stored | {"maps": []})
    with pytest.raises(runs.RunError, match=r"decision\.json is for another map to p_correct"):
        open_hosted([str(place)], TEXT_SETTINGS)
