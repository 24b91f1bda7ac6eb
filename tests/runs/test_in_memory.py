"""A run whose records were never in a file, at every entry point, against the same from a file."""

import copy
import json
from pathlib import Path

import pandas
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

import bloblora
from bloblora import runs
from bloblora.data import DataError, as_records, read_records
from bloblora.runs.decide import calibrate
from tests.tiny_base import TEXTS, held_out, queries, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")
TWO = runs.PredictionOptions(samples=2)
ALL = [text for texts in TEXTS.values() for text in texts]


def config_of(base, data, output, **options):
    settings = dict(model=str(base), steps=3, batch_size=2, r=2, learning_rate=0.01, init_std=0.1)
    return runs.RunConfig.of(data=data, output=str(output), **settings, **options)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A run from a file."""
    folder = tmp_path_factory.mktemp("file")
    file = write_jsonl(folder / "queries.jsonl", queries())
    return runs.train(config_of(base, str(file), folder / "run"), progress=False)


@pytest.mark.parametrize("kind", [list, pandas.DataFrame, Dataset.from_list])
def test_training_is_that_of_a_file(base, trained, tmp_path, kind):
    config = config_of(base, kind(queries()), tmp_path / "run")
    run = runs.train(config, progress=False)
    expected = trained.predict(queries(), 2)
    assert torch.equal(run.predict(queries(), 2).log_probs, expected.log_probs)
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    of_file = json.loads((Path(trained.config.output) / "run.json").read_text())
    assert stored["config"]["data"] == "in memory"
    assert stored["records_sha256"] == of_file["records_sha256"]
    assert "data: in memory" in (tmp_path / "run" / "config.yaml").read_text()
    assert torch.equal(runs.load_run(tmp_path / "run").predict(queries(), 2).log_probs, expected.log_probs)
    assert runs.train(copy.deepcopy(config), progress=False).training == stored["training"]  # a finished one is loaded
    with pytest.raises(runs.RunError, match="training records were others"):
        runs.train(config.with_options(data=queries()[1:]), progress=False)
    with pytest.raises(runs.RunError, match=r"in memory.*runs.fit_distance\(run, description, records\) once"):
        runs.training_records(runs.open_run(tmp_path / "run"))
    runs.fit_distance(run, runs.open_run(tmp_path / "run"), kind(queries()))
    assert runs.open_distance(runs.open_run(tmp_path / "run")) is not None


@pytest.mark.filterwarnings("ignore:validation 'in memory'")
def test_validation_records_in_memory(base, tmp_path):
    config = config_of(base, queries(), tmp_path / "run", validation=pandas.DataFrame(queries()), eval_steps=1)
    assert config.with_options(r=3).validation == queries()
    run = runs.train(config, progress=False)
    assert run.training["validation"]["num_examples"] == 4
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert stored["config"]["validation"] == "in memory"
    assert stored["validation_sha256"] == stored["records_sha256"]


def test_records_that_cannot_be_trained_on(base, tmp_path):
    for records, message in (
        (ALL, "row 1, 2, 3, 4: field 'label': missing"),
        ([{"text": "x", "label": "a"}, {"text": "", "label": "b"}], "row 2: field 'text': ''"),
    ):
        with pytest.raises(DataError, match=message):
            config_of(base, records, tmp_path)
    with pytest.raises(runs.RunError, match="data and validation must have at least one record"):
        config_of(base, [], tmp_path)


def test_every_entry_point_takes_them(trained):
    expected = trained.predict(queries(), 2)
    frame, dataset = pandas.DataFrame(queries()), Dataset.from_list(queries())
    for source in (ALL, frame, dataset, frame["text"]):
        assert torch.equal(trained.predict(source, 2).log_probs, expected.log_probs)
    assert torch.equal(trained.predict(ALL[1], 2).log_probs[:, 0], expected.log_probs[:, 1])
    assert torch.equal(trained.hidden_states(frame), trained.hidden_states(queries()))
    lines = [*runs.describe(trained, queries(), TWO)]
    for source in (frame, dataset):
        assert [*runs.describe(trained, source, TWO)] == lines
        assert runs.evaluate(trained, source, ALL, TWO) == runs.evaluate(trained, queries(), queries(), TWO)
    description, promises = runs.open_run(trained.config.output), {"risk": 0.9, "level": 0.1, "coverage": 0.5}
    promises["false_alarm"] = 0.5
    others = held_out()
    assert calibrate(description, pandas.DataFrame(others), ALL, TWO, **promises) == calibrate(
        description, others, queries(), TWO, **promises
    )
    with pytest.raises(DataError, match="row 1, 2, 3, 4: field 'label': missing"):
        runs.evaluate(trained, ALL, None, TWO)


def test_a_pipeline_answers_each_row_of_a_table(trained):
    classify = bloblora.pipeline(trained, num_samples=2)
    expected = classify(ALL)
    for source in (pandas.DataFrame(queries()), Dataset.from_list(queries()), pandas.Series(ALL)):
        assert classify(source) == expected
    assert classify(pandas.DataFrame(queries())[:1], top_k=None) == classify(ALL[:1], top_k=None)


def test_predict_takes_texts_with_a_tokenizer_and_loaders(trained):
    expected = trained.predict(queries(), 2).log_probs
    model, tokenizer = trained.model, trained.tokenizer
    read = [{**record, "text": trained.task.template.format(text=record["text"])} for record in queries()]
    for source in ([record["text"] for record in read], pandas.DataFrame(read), Dataset.from_list(read)):
        found = bloblora.predict(model, source, 2, tokenizer=tokenizer)
        torch.testing.assert_close(found.log_probs, expected, rtol=0, atol=1e-5)
    (one,) = bloblora.predict(model, read[2]["text"], 2, tokenizer=tokenizer).labels
    assert one == expected.logsumexp(0).argmax(-1)[2]
    examples = [{**tokenizer(record["text"]), "labels": 0} for record in read]
    loader = DataLoader(examples, batch_size=3, collate_fn=DataCollatorWithPadding(tokenizer))
    torch.testing.assert_close(bloblora.predict(model, loader, 2).log_probs, expected, rtol=0, atol=1e-5)
    with_task = DataLoader([{"input_ids": e["input_ids"]} for e in examples], 2, collate_fn=trained.task.collate)
    found = bloblora.predict(model, with_task, 2, task=trained.task)
    torch.testing.assert_close(found.log_probs, expected, rtol=0, atol=1e-5)


def test_predict_says_what_it_needs(trained):
    model, tokenizer = trained.model, trained.tokenizer
    with pytest.raises(ValueError, match=r"without a task, pass texts with tokenizer=…, what the .* got list"):
        bloblora.predict(model, ALL)
    with pytest.raises(
        ValueError,
        match=r"the DataLoader's RandomSampler isn't known to keep .* give shuffle=False",
    ):
        bloblora.predict(model, DataLoader([{"input_ids": [3]}], shuffle=True))
    with pytest.raises(ValueError, match="must give dicts of tensors by name, got list"):
        bloblora.predict(model, DataLoader([torch.ones(2)], collate_fn=list))
    with pytest.raises(ValueError, match="tokenizer and task both say"):
        bloblora.predict(model, ALL, tokenizer=tokenizer, task=trained.task)
    with pytest.raises(ValueError, match="with a tokenizer alone they must be texts"):
        bloblora.predict(model, [{"prompt": "x"}], tokenizer=tokenizer)
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    with pytest.raises(ValueError, match="tokenizer: has no pad token; set one"):
        bloblora.predict(model, ALL, tokenizer=bare)
    for empty in ([], DataLoader([])):
        with pytest.raises(ValueError, match="there is nothing to predict"):
            bloblora.predict(model, empty, tokenizer=tokenizer if empty == [] else None)


def test_prompts(base, tmp_path):
    records = [{"prompt": "Which gas do plants take?", "response": "carbon dioxide"}, {"prompt": "x", "response": "y"}]
    run = runs.train(config_of(base, pandas.DataFrame(records), tmp_path / "run"), progress=False)
    options = {"max_new_tokens": 3, "do_sample": False}
    expected = run.generate(records, 2, **options).texts
    assert len(expected) == 2
    assert run.generate([record["prompt"] for record in records], 2, **options).texts == expected
    (line,) = run.describe_texts(records[0]["prompt"], 2, **options)
    assert line["prompt"] == records[0]["prompt"]


def test_columns_and_labels_in_another_form(base, tmp_path):
    """A column of another name, and the labels of a table of texts, of a typed one and of texts that were typed."""
    rows = [{"said": record["text"], "label": record["label"] == "parcel"} for record in queries()]
    pandas.DataFrame(rows).to_csv(file := tmp_path / "rows.csv", index=False)
    of_file = runs.train(config_of(base, str(file), tmp_path / "file", text_column="said"), progress=False)
    config = config_of(base, pandas.DataFrame(rows), tmp_path / "run", text_column="said")
    run = runs.train(config.with_options(seed=0), progress=False)
    assert run.task.labels == of_file.task.labels == ("false", "true")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["reading"] == {"text_column": "said"}
    expected = runs.evaluate(run, pandas.DataFrame(rows), options=TWO)
    as_texts = pandas.read_csv(file, dtype=str)
    assert set(as_texts["label"]) == {"True", "False"}
    assert runs.evaluate(runs.load_run(tmp_path / "run"), as_texts, options=TWO) == expected
    description = runs.open_run(tmp_path / "file")
    assert read_records(file, known=description.known) == as_records(as_texts, known=description.known)
    with pytest.raises(runs.RunError, match="the run has seen 4 of the 4 records"):
        calibrate(description, as_texts)
    with pytest.raises(DataError, match="text_column 'words': there is no such column; it has said, label"):
        config_of(base, pandas.DataFrame(rows), tmp_path / "none", text_column="words")
