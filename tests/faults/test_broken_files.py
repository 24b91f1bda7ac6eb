"""Files that aren't what they should be: one message, exit status 2, and what can be written is."""

import json
import re
import shutil
from datetime import date, datetime, timedelta
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

from bloblora.data import as_records
from bloblora.messages import LONGEST, escaped, quoted, shortened
from bloblora.models import ModelError, load_model, load_tokenizer
from bloblora.tasks import TaskError, build_task


@pytest.fixture
def copy(files, tmp_path):
    """The base model's folder, with some values of config.json changed."""

    def copy(**values):
        folder = tmp_path / "copy"
        shutil.copytree(files.base, folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))
        return folder

    return copy


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": 0},
        {"hidden_size": "x"},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"vocab_size": 0},
        {"rope_parameters": []},
        {"hidden_act": 3},
        {"quantization_config": 3},
        {"model_type": 3},
    ],
    ids=str,
)
def test_a_wrong_config(copy, values):
    with pytest.raises(ModelError, match=r"model '.*' can't be loaded: .+ \(give 'smollm2-135m'"):
        load_model(str(copy(**values)))


def test_weights_that_a_config_asks_for_and_no_file_has(copy):
    """transformers draws them at random; only a head may be."""
    with pytest.raises(ModelError, match=r"its files lack model\.layers\.2\..* and \d more weights that its config"):
        load_model(str(copy(num_hidden_layers=3)), num_labels=2)
    assert load_model(str(copy(num_hidden_layers=2)), num_labels=2).score.out_features == 2


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, "3", "[]", "{"], ids=["nested", "3", "list", "cut"])
def test_json_of_a_base_that_is_none(copy, name, content):
    folder = copy()
    (folder / name).write_text(content)
    with pytest.raises(ModelError, match="can't be loaded"):
        load_tokenizer(str(folder))


def test_a_pickle_is_not_read(call, files, copy, tmp_path):
    folder = copy()
    torch.save(load_model(str(folder)).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    status, out, err = call("train", "--model", folder, "--data", files.texts, "--output", tmp_path / "run")
    assert (status, out) == (2, "")
    assert "no file named model.safetensors" in err


@pytest.mark.parametrize(
    "template",
    ["{{ 1/0 }}", "{{ messages + 3 }}", "{{ 'a' * 10**12 }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"],
)
def test_a_chat_template_that_fails(files, template):
    tokenizer = AutoTokenizer.from_pretrained(files.base)
    tokenizer.chat_template = template
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    task = build_task("generation", [record], tokenizer)
    with pytest.raises(TaskError, match=r"field 'messages': the chat template can't be filled: .+"):
        task.encode(record, tokenizer)


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__.__mro__[1].__subclasses__()",
        "cycler.__init__.__globals__.os.system('touch ' + messages[0].content)",
        "messages.append(1)",
    ],
)
def test_a_chat_template_stays_in_its_sandbox(files, expression, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(files.base)
    tokenizer.chat_template = f"{{{{ {expression} }}}}"
    marker = tmp_path / "was_run"
    record = {"messages": [{"role": "user", "content": str(marker)}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(TaskError, match=r"the chat template can't be filled: .*(is unsafe|is not safe)"):
        build_task("generation", [record], tokenizer).encode(record, tokenizer)
    assert not marker.exists()


def test_ten_thousand_choices(files):
    """A row of all choices needs memory for the square of its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(files.base)
    record = {"question": "Which?", "choices": [f"choice {i}" for i in range(10_000)], "answer": 3}
    task = build_task("choice_text", [record], tokenizer)
    with pytest.raises(TaskError, match=r"10000 choices have \d+ tokens with the question.*at most 8192: give fewer"):
        task.encode(record, tokenizer)


IDS = {
    "when": (datetime(2026, 1, 2, 3, 4), "2026-01-02T03:04:00"),
    "day": (date(2026, 1, 2), "2026-01-02"),
    "text": (b"a-7", "a-7"),
    "bytes": (b"\xff\x00", "ff00"),
    "decimal": (Decimal("1.50"), "1.50"),
    "duration": (timedelta(hours=1), "1:00:00"),
    "nan": (float("nan"), None),
    "nested": ({"a": [date(2026, 1, 2)]}, {"a": ["2026-01-02"]}),
    "number": (7, 7),
}


def test_ids_are_written_as_json_can_hold_them(call, run, tmp_path):
    for name, (value, expected) in IDS.items():
        assert as_records([{"id": value, "text": "a"}])[0].get("id") == expected, name
    ids = pa.array([IDS["when"][0]], type=pa.timestamp("us"))
    pq.write_table(pa.table({"id": ids, "text": ["where is my parcel"]}), tmp_path / "data.parquet")
    status, out, _ = call("predict", run, "--input", tmp_path / "data.parquet", "--samples", "0")
    assert status == 0
    assert json.loads(out)["id"] == IDS["when"][1]


HUGE = 10**400
PREDICTED = {"probabilities": [0.7, 0.3], "target": 0}
STUDY = {"datasets": {"a": {"train": {"data": "x"}, "test": "x"}}, "methods": {"blob": {}}, "baseline": "blob"}
TRAINED = {"data": "support_desk", "output": "none"}


@pytest.mark.parametrize(
    ("command", "content", "message"),
    [
        ("calibrate", PREDICTED | {"probabilities": [HUGE, 0]}, r"field 'probabilities': 10*… must be a number"),
        ("calibrate", PREDICTED | {"num_draws": [1]}, r"field 'num_draws': \[1\] must be a number"),
        ("calibrate", PREDICTED | {"log_probabilities": "ab"}, "must be a list of 2 numbers"),
        ("calibrate", PREDICTED | {"log_probabilities": [0]}, "must be a list of 2 numbers"),
        ("calibrate", PREDICTED | {"log_probabilities": [0, None]}, "must be a list of 2 numbers"),
        ("calibrate", {"value": HUGE, "std": 1, "target": 1}, "field 'value': 10*… must be a number"),
        ("compare", STUDY | {"baseline": ["blob"]}, r"baseline \['blob'\] is not one of the methods"),
        ("compare", STUDY | {"datasets": {"a": {"train": {"data": 3}, "test": "x"}}}, "field 'data': 3; it must name"),
        ("compare", STUDY | {"datasets": {"a": {"train": {"data": "x"}, "test": None}}}, "field 'test' is missing"),
        ("train", TRAINED | {"seed": HUGE}, "seed must be in 0..2^32 - 1"),
        ("train", TRAINED | {"prior_std": HUGE}, "--prior-std: .* 10+…; see"),
        ("train", TRAINED | {"task": [["a"]]}, "task"),
    ],
)
def test_values_that_are_none(call, tmp_path, command, content, message):
    file = tmp_path / ("rows.jsonl" if command == "calibrate" else "options.yaml")
    file.write_text((json.dumps(content) + "\n") * (60 if command == "calibrate" else 1))
    option = {
        "calibrate": ("--predictions", file),
        "compare": (file, "--output", tmp_path),
        "train": ("--config", file),
    }
    status, out, err = call(command, *option[command])
    assert (status, out) == (2, "")
    assert re.search(message.replace("^", r"\^"), err)
    assert max(map(len, err.splitlines())) < 700


def test_values_in_messages_are_short_and_printed():
    long, colour = "x" * 10_000, "\x1b[31mred\u202e"
    assert quoted(long).count("x") == LONGEST - 1
    assert len(quoted([long])) == LONGEST
    assert quoted(colour) == "'\\x1b[31mred\\u202e'"
    assert shortened(f"{colour}\n again") == "\\x1b[31mred\\u202e again"
    assert escaped("one\ntwo\r\x07é") == "one\ntwo\\r\\x07é"


def test_a_message_of_the_command_line(call, tmp_path):
    status, _, err = call("predict", f"{tmp_path}/no\x1b[2Jrun", "--input", "x")
    assert status == 2
    assert "\x1b" not in err
    assert r"no\x1b[2Jrun" in err
