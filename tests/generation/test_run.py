"""Training on prompts and responses through a run, and writing with it."""

import io
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from bloblora import runs
from bloblora.cli.text import GenerationOptions, generate
from bloblora.data import ReadingOptions
from bloblora.generation.asking import question_length
from bloblora.runs.checks import check_generates
from bloblora.runs.texts import WritingOptions
from tests.tiny_base import queries, write_jsonl, write_signed

from .conftest import RECORDS, SETTINGS


def test_training_teaches_the_responses(trained):
    assert trained.task.name == "generation"
    assert trained.training["curve"][-1][1] < 0.5 * trained.training["curve"][0][1]
    found = trained.generate(RECORDS, 0, max_new_tokens=16, do_sample=False)
    assert [text.strip() for text in found.texts] == ["carbon dioxide", "my card"]
    assert found.mask.sum(-1).tolist() < [16, 16]  # they end


@pytest.mark.parametrize("of_base", [None, 17, [17, 18]])
def test_a_response_ends_where_training_ended_it(of_base, trained, monkeypatch):
    expected = trained.generate(RECORDS, 2, max_new_tokens=16, do_sample=False)
    monkeypatch.setattr(trained.model.generation_config, "eos_token_id", of_base)
    found = trained.generate(RECORDS, 2, max_new_tokens=16, do_sample=False)
    assert found.token_ids() == expected.token_ids()


def test_a_response_also_ends_where_the_base_ends_it(trained, monkeypatch):
    tokens = trained.generate(RECORDS[:1], 2, max_new_tokens=16, do_sample=False).token_ids()[0]
    monkeypatch.setattr(trained.model.generation_config, "eos_token_id", tokens[1])
    for options, size in (({}, 2), ({"eos_token_id": tokens[2]}, 3)):
        found = trained.generate(RECORDS[:1], 2, max_new_tokens=16, do_sample=False, **options)
        assert found.token_ids() == [tokens[:size]]
    given = GenerationConfig(eos_token_id=tokens[2])
    found = trained.generate(RECORDS[:1], 2, max_new_tokens=16, do_sample=False, generation_config=given)
    assert found.token_ids() == [tokens[:3]]


@pytest.mark.parametrize("decoding", ["mean", "average"])
def test_stop_strings(decoding, trained, monkeypatch):
    how = dict(max_new_tokens=16, do_sample=False, draws=True, answers=2, decoding=decoding)
    whole = trained.generate(RECORDS, 2, **how).texts
    found = trained.generate(RECORDS, 2, stop_strings=["bon"], **how)
    monkeypatch.setattr(trained.model.generation_config, "stop_strings", "bon")
    assert trained.generate(RECORDS, 2, **how).texts == found.texts
    cut, other = found.texts
    assert cut in whole[0]
    assert len(cut) < len(whole[0])
    assert other == whole[1]
    assert [text for text in found.draw_texts[0] if "bon" in text] == [cut] * 2
    with pytest.raises(ValueError, match="stop_strings: 'bon' are found in texts; give the tokenizer"):
        trained.generate(RECORDS, 2, tokenizer=None, **how | {"answers": 0})
    assert trained.generate(RECORDS, 2, stop_strings=None, **how).texts == whole


def test_a_temperature_of_one_samples_by_unchanged_probabilities(trained, monkeypatch):
    how = WritingOptions(max_new_tokens=6, temperature=3.0, answers=2).of_generation()
    expected = trained.generate(RECORDS, 2, **how)
    of_base = {"min_p": 0.9, "typical_p": 0.1, "epsilon_cutoff": 0.5, "eta_cutoff": 0.5, "top_k": 1, "top_p": 0.1}
    for name, value in of_base.items():
        monkeypatch.setattr(trained.model.generation_config, name, value)
    found = trained.generate(RECORDS, 2, **how)
    assert found.texts == expected.texts != trained.generate(RECORDS, 2, max_new_tokens=6, do_sample=False).texts
    assert found.sampled_texts == expected.sampled_texts


def test_a_loaded_run_writes_the_same(trained):
    again = runs.load_run(trained.config.output)
    how = dict(max_new_tokens=8, do_sample=False, draws=True)
    expected = trained.generate(RECORDS, 3, **how)
    found = again.generate([{"prompt": record["prompt"]} for record in RECORDS], 3, **how)
    assert found.texts == expected.texts
    assert found.draw_texts == expected.draw_texts


@pytest.mark.parametrize(
    "method", ["lora", "mc-dropout", "ensemble", "mixture", "blob", "tfb", "swag", "scalabl", "c-lora"]
)
def test_every_method_of_weight_draws_writes(method, base, tmp_path):
    data = write_jsonl(tmp_path / "train.jsonl", RECORDS)
    options = {"members": 2} if method in ("ensemble", "mixture") else {}
    config = runs.RunConfig.of(
        data=str(data),
        model=str(base),
        output=str(tmp_path / "run"),
        method=method,
        **{**SETTINGS, "steps": 2},
        **options,
    )
    found = runs.train(config, progress=False).generate(RECORDS, 3, max_new_tokens=4, do_sample=False, draws=True)
    assert len(found.draw_tokens) == {"lora": 1, "ensemble": 2}.get(method, 3)
    assert torch.isfinite(torch.stack([*found.scores().values()])).all()


def test_the_command(trained, tmp_path, capsys, caplog):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", RECORDS)
    output = tmp_path / "answers.jsonl"
    options = GenerationOptions(samples=3, max_new_tokens=8, draws=True)
    folder = shutil.copytree(trained.config.output, tmp_path / "run")
    stored = json.loads((folder / "run.json").read_text())
    stored["training"]["warnings"] = ["it learned nothing"]
    write_signed(folder / "run.json", stored)
    generate(str(folder), str(prompts), options, ReadingOptions(), output=str(output))
    assert "this run: it learned nothing" in caplog.messages
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == [record["prompt"] for record in RECORDS]
    assert lines[0]["id"] == 7
    expected = trained.generate(RECORDS, 3, max_new_tokens=8, do_sample=False, draws=True)
    assert [line["answer"] for line in lines] == expected.texts
    assert [line["draws"] for line in lines] == expected.draw_texts
    for name, values in expected.scores().items():
        assert [line[name] for line in lines] == pytest.approx(values.tolist(), abs=1e-6)
    for i, line in enumerate(lines):
        kept, tokens = expected.mask[i], line["tokens"]
        assert tokens["ids"] == expected.tokens[i, kept].tolist()
        assert tokens["ranks"] == expected.ranks[i, kept].tolist()
        assert tokens["mutual_information"] == pytest.approx(
            expected.token_mutual_information[i, kept].tolist(), abs=1e-6
        )
        whole = [sum(of_draw) for of_draw in tokens["draw_log_probabilities"]]
        assert line["draw_log_probabilities"] == pytest.approx(whole, abs=1e-4)
        assert sum(tokens["log_probabilities"]) == pytest.approx(line["sequence_log_probability"], abs=1e-4)
    assert capsys.readouterr().out == ""


def test_the_command_answers_a_stream_with_samples(trained, monkeypatch, capsys):
    text = "".join(json.dumps({"prompt": record["prompt"]}) + "\n" for record in RECORDS)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    options = GenerationOptions(samples=2, max_new_tokens=4, temperature=5.0, top_p=0.9)
    generate(trained.config.output, "-", options, ReadingOptions())
    first = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    options = {"max_new_tokens": 4, "do_sample": True, "temperature": 5.0, "top_p": 0.9, "top_k": 0}
    assert [line["answer"] for line in first] == trained.generate(RECORDS, 2, **options).texts
    assert not {"draws", "agreement"} & first[0].keys()


def test_a_long_prompt_leaves_room_for_the_answer(trained, monkeypatch):
    """A model with a table of positions would fail, others answer beyond what they were trained on."""
    long = {"prompt": "which gas is it " * 20 + RECORDS[0]["prompt"]}
    monkeypatch.setattr(trained.tokenizer, "model_max_length", 40)
    found = trained.generate([long], 2, max_new_tokens=16, do_sample=False)
    ids = trained.tokenizer(long["prompt"])["input_ids"]
    kept = {"prompt": ids[-24:], "truncated": 0}
    expected = trained.generate_encoded([kept], 2, max_new_tokens=16, do_sample=False)
    assert found.texts == expected.texts
    torch.testing.assert_close(found.draw_sequence_log_probs, expected.draw_sequence_log_probs)
    with pytest.raises(runs.RunError, match="max_new_tokens must be below 40, the tokens that the model reads, got 40"):
        trained.generate([long], 2, max_new_tokens=40)


def test_a_long_prompt_leaves_room_for_the_question_whether_its_answer_is_true(trained, monkeypatch):
    long, read = {"prompt": "which gas is it " * 40}, []
    monkeypatch.setattr(trained.tokenizer, "model_max_length", 100)
    embeddings = trained.model.get_base_model().get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _, inputs, __: read.append(inputs[0].shape[1]))
    trained.generate([long], 2, max_new_tokens=16, do_sample=False, p_true=True)
    hook.remove()
    assert 80 < max(read) <= 100
    more = question_length(trained.tokenizer)
    with pytest.raises(runs.RunError, match=f"max_new_tokens must be below {100 - more}"):
        trained.generate([long], 2, max_new_tokens=100 - more, p_true=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be 0, or a finite number of at least 1e-06, got -1.0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"samples": -1}, "samples must be 0"),
        ({"input": "texts"}, "needs records with 'prompt' or 'messages', not 'text'"),
    ],
)
def test_wrong_options(options, message, trained, tmp_path):
    data = write_jsonl(tmp_path / "texts.jsonl", queries())
    options = {key: value for key, value in options.items() if key != "input"}
    with pytest.raises(runs.RunError, match=message):
        generate(trained.config.output, str(data), GenerationOptions(**options), ReadingOptions())


def test_runs_that_do_not_fit(trained, base, tmp_path):
    with pytest.raises(runs.RunError, match="use `bloblora generate`"):
        runs.check_kind(trained.task, RECORDS)
    data = write_jsonl(tmp_path / "train.jsonl", RECORDS)
    config = partial(runs.RunConfig.of, data=str(data), model=str(base), output=str(tmp_path / "run"))
    for options, message in (
        ({"task": "choice_text"}, "task 'choice_text' needs records with 'question' and 'choices'"),
        ({"method": "laplace-lora"}, "method 'laplace-lora' is for labels and choices"),
        ({"temperature_scaling": True, "validation": 0.5}, "temperature_scaling is for labels and choices"),
        ({"normalization": "sum"}, "generation has no option 'normalization'"),
    ):
        with pytest.raises(ValueError, match=message):
            runs.train(config(**options), progress=False)
    texts = write_jsonl(tmp_path / "texts.jsonl", queries())
    text_run = runs.train(
        runs.RunConfig.of(data=str(texts), model=str(base), output=str(tmp_path / "texts"), steps=1, batch_size=2),
        progress=False,
    )
    with pytest.raises(runs.RunError, match="the run's task is classification, which writes no text"):
        check_generates(text_run.task, RECORDS)
    assert not (Path(tmp_path) / "run" / "checkpoints").exists()
