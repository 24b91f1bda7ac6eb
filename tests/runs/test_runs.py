"""A run from data file to saved adapter and back, stopped and resumed, with a tiny base model on disk."""

import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

import bloblora
from bloblora import runs
from bloblora.adapter import find_posterior
from bloblora.data import DataError
from bloblora.files import write_text
from bloblora.runs.selection import split
from tests.tasks.conftest import tiny_causal, with_lora
from tests.tiny_base import QUESTIONS, queries, write_jsonl

TWO = runs.PredictionOptions(samples=2)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {
        "texts": write_jsonl(folder / "texts.jsonl", queries()),
        "questions": write_jsonl(folder / "questions.jsonl", QUESTIONS),
    }


@pytest.fixture
def config(base, files, tmp_path):
    return runs.RunConfig.of(
        data=str(files["texts"]),
        output=str(tmp_path / "run"),
        model=str(base),
        steps=4,
        batch_size=2,
        save_steps=2,
        r=2,
        learning_rate=0.01,
    )


def adapter_bytes(folder):
    names = ("adapter_model.safetensors", "posterior.safetensors")
    return {name: (Path(folder) / name).read_bytes() for name in names if (Path(folder) / name).is_file()}


@pytest.mark.parametrize("method", ["blob", "lora"])
@pytest.mark.parametrize("data", ["texts", "questions"])
def test_a_loaded_run_predicts_the_same_bits(config, files, data, method):
    config = config.with_options(data=str(files[data]), method=method)
    run = runs.train(config, progress=False)
    records = [
        {k: v for k, v in r.items() if k not in ("label", "answer")} for r in (queries(), QUESTIONS)[data != "texts"]
    ]
    before = run.predict(records, 3, seed=5)
    loaded = runs.load_run(config.output)
    after = loaded.predict(records, 3, seed=5)
    assert torch.equal(before.log_probs, after.log_probs)
    found = {"validation": 0.0, "temperature_scaling": False, "dtype": "float32"}
    of_texts = {"head_prior_std": "none", "head": "class_means"}
    found |= of_texts if (data, method) == ("texts", "blob") else {"head": "trained"}
    assert loaded.config == run.config == config.with_options(**found)
    assert (find_posterior(loaded.model) is not None) == (method == "blob")
    draws = after.log_probs
    assert method == "lora" or data == "texts" or not torch.equal(draws[0], draws[1])  # of a head the mean is known


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_from_end_to_end(config, dtype):
    """A base model in half precision, with a float32 adapter and head: all that is saved and answered is finite."""
    run = runs.train(config.with_options(dtype=dtype), progress=False)
    saved = [load_file(Path(config.output) / f"{name}.safetensors") for name in ("adapter_model", "posterior")]
    numbers = {name: tensor for tensors in saved for name, tensor in tensors.items()}
    assert all(tensor.isfinite().all() for tensor in numbers.values())
    assert all(tensor.dtype == torch.float32 for tensor in numbers.values())
    loaded = runs.load_run(config.output)
    assert loaded.model.base_model.model.model.embed_tokens.weight.dtype == getattr(torch, dtype)
    found = loaded.predict(queries(), 3).log_probs
    assert found.isfinite().all()
    assert torch.equal(found, run.predict(queries(), 3).log_probs)


def test_the_classification_head_is_trained_saved_and_loaded(config, base):
    run = runs.train(config, progress=False)
    saved = load_file(Path(config.output) / "adapter_model.safetensors")
    (name,) = (name for name in saved if "score" in name)
    assert saved[name].shape == (2, 32)
    torch.manual_seed(config.seed)
    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).score.weight
    loaded = runs.load_run(config.output).model.base_model.model.score
    assert torch.equal(loaded.weight, saved[name])
    assert torch.equal(run.model.base_model.model.score.weight, saved[name])
    assert not torch.equal(saved[name], fresh)


class Kill(TrainerCallback):
    """Stop as a kill does: without any of the clean-up."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_stopped_run_goes_on_to_the_same_bytes(config, tmp_path, step):
    whole = config.with_options(output=str(tmp_path / "whole"))
    runs.train(whole, progress=False)
    with pytest.raises(KeyboardInterrupt):
        runs.train(config, progress=False, callbacks=[Kill(step)])
    with pytest.raises(runs.RunError, match="its training isn't finished; run the same `bloblora train` again"):
        runs.load_run(config.output)
    run = runs.train(config, progress=False)
    assert run.training["resumed_from"] == (None if step == 1 else "checkpoint-2")
    assert adapter_bytes(config.output) == adapter_bytes(whole.output)
    assert len(adapter_bytes(whole.output)) == 2
    assert not (Path(config.output) / "checkpoints").exists()


class SystemsKill(Kill):
    """The kill that nothing can catch."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def test_after_a_sigkill(config, tmp_path):
    options = {"progress": False, "callbacks": [SystemsKill(3)]}
    killed = multiprocessing.get_context("fork").Process(target=runs.train, args=(config,), kwargs=options)
    killed.start()
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL
    assert runs.train(config, progress=False).training["resumed_from"] == "checkpoint-2"
    whole = config.with_options(output=str(tmp_path / "whole"))
    runs.train(whole, progress=False)
    assert adapter_bytes(config.output) == adapter_bytes(whole.output)


def test_a_finished_run_is_not_trained_again(config):
    first = runs.train(config, progress=False)
    before = {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*")}
    for left in (".data", "checkpoints/checkpoint-1"):  # by a kill after the run was complete
        (Path(config.output) / left).mkdir(parents=True)
    for left in (".lock", ".data/records.arrow", ".run.json.0123abcd.partial"):
        (Path(config.output) / left).touch()
    again = runs.train(config, progress=False, callbacks=[Kill(1)])
    assert again.training == first.training
    assert {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*")} == before


def test_another_configuration_names_the_fields(config):
    runs.train(config, progress=False)
    with pytest.raises(runs.RunError, match=r"another .* \(max_steps: 4 there, 5 now; seed: 0 there, 1 now\)"):
        runs.train(config.with_options(steps=5, seed=1), progress=False)


@pytest.mark.parametrize("finished", [False, True])
def test_changed_data_of_the_same_name(config, tmp_path, finished):
    file = write_jsonl(tmp_path / "mine.jsonl", queries())
    config = config.with_options(data=str(file))
    if finished:
        runs.train(config, progress=False)
    else:
        with pytest.raises(KeyboardInterrupt):
            runs.train(config, progress=False, callbacks=[Kill(3)])
    write_jsonl(file, [*queries(), {"text": "one more", "label": "refund"}])
    with pytest.raises(runs.RunError, match="training records were others: the data changed since"):
        runs.train(config, progress=False)
    moved = write_jsonl(tmp_path / "moved.jsonl", queries())
    runs.train(config.with_options(data=str(moved)), progress=False)


def test_seconds_add_up_over_sessions(config):
    class Slow(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            time.sleep(0.4)

    with pytest.raises(KeyboardInterrupt):
        runs.train(config, progress=False, callbacks=[Slow(), Kill(3)])
    run = runs.train(config, progress=False)
    # two slow steps are in the checkpoint; the third was thrown away
    assert run.training["seconds"] >= 0.8
    stored = json.loads((Path(config.output) / "run.json").read_text())
    assert stored["training"] == run.training


def test_the_last_log_is_of_the_end(config, tmp_path):
    config = config.with_options(steps=5, validation=0)
    curves = []
    for every in (1, 3):
        run = runs.train(config.with_options(output=str(tmp_path / str(every)), logging_steps=every), progress=False)
        assert run.training["final"]["step"] == 5
        curves.append(dict(run.training["curve"]))
    fine, coarse = curves
    assert coarse == pytest.approx({3: (fine[1] + fine[2] + fine[3]) / 3, 5: (fine[4] + fine[5]) / 2}, rel=1e-5)


def test_config_yaml_trains_the_same(config, tmp_path):
    runs.train(config, progress=False)
    stored = yaml.safe_load((Path(config.output) / "config.yaml").read_text(encoding="utf-8"))
    again = runs.RunConfig.of(**{**stored, "output": str(tmp_path / "again")})
    runs.train(again, progress=False)
    assert adapter_bytes(again.output) == adapter_bytes(config.output)
    assert not list(Path(config.output).glob(".*.partial"))


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    runs.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        runs.write_json(tmp_path / "x.json", {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "x.json", "half " + "\ud800")
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def flip(file, offset=-1):
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("method", "damage", "message"),
    [
        ("blob", lambda run: flip(run / "adapter_model.safetensors"), "SHA-256"),
        ("blob", lambda run: flip(run / "posterior.safetensors"), "SHA-256"),
        ("lora", lambda run: flip(run / "adapter_model.safetensors"), "SHA-256"),
        ("lora", lambda run: (run / "adapter_model.safetensors").unlink(), "missing"),
        ("blob", lambda run: (run / "posterior.safetensors").unlink(), "missing"),
        (
            "blob",
            lambda run: [(run / name).unlink() for name in ("posterior.safetensors", "blob_config.json")],
            "the posterior's files are missing",
        ),
        ("lora", lambda run: (run / "task.json").unlink(), r"task\.json: not readable"),
        ("lora", lambda run: (run / "run.json").write_text("{"), r"run\.json: not readable as JSON"),
        ("lora", lambda run: (run / "run.json").write_text("[]"), r"run\.json: must hold a JSON object"),
        (
            "lora",
            lambda run: (run / "run.json").write_text('{"training": {"a": 1}}'),
            r"run\.json: field 'libraries' is missing",
        ),
        ("lora", lambda run: (run / "run.json").unlink(), r"no run\.json in it"),
    ],
)
def test_a_damaged_run(config, method, damage, message):
    runs.train(config.with_options(method=method, steps=1), progress=False)
    damage(Path(config.output))
    with pytest.raises(ValueError, match=message):
        runs.load_run(config.output)


def test_a_share_that_holds_nothing_out(config):
    with pytest.raises(runs.RunError, match=r"0\.1 of 4 records holds none out; give a larger share"):
        runs.train(config.with_options(method="laplace-lora", holdout=0.1), progress=False)


def test_limit_takes_so_many_of_each_label():
    records = [{"text": f"{label}{i}", "label": label} for label in "abc" for i in range(9)]
    chosen = runs.select(records, 4, seed=1)
    assert Counter(r["label"] for r in chosen) == {"a": 4, "b": 4, "c": 4}
    assert len({r["text"] for r in chosen}) == 12
    assert runs.select(records, 4, seed=1) == chosen != runs.select(records, 4, seed=2)
    assert len(runs.select(records, 100)) == 27
    assert runs.select(records, None) is records


@pytest.mark.parametrize(
    ("counts", "share", "held_out"),
    [
        ([10, 4, 6], 0.2, [2, 1, 1]),  # as rounded
        ([10, 10], 0.25, [2, 3]),  # 5 of them
        ([9, 8, 3], 0.15, [1, 1, 1]),  # remainders of 0.35, 0.2 and 0.45
        ([1, 1, 40], 0.5, [0, 0, 21]),
        ([2, 2], 0.99, [1, 1]),
    ],
)
def test_a_share_of_all_records_is_held_out(counts, share, held_out):
    records = [
        {"text": f"{label}{i}", "label": label}
        for label, count in zip("abc", counts, strict=False)
        for i in range(count)
    ]
    kept, out = split(records, share)
    assert sorted(Counter(r["label"] for r in out).values()) == sorted(filter(None, held_out))
    assert sorted(r["text"] for r in kept + out) == sorted(r["text"] for r in records)


def test_copies_of_a_record_are_on_one_side():
    records = [{"text": f"{i // 4}", "label": "ab"[i // 40]} for i in range(80)]
    sides = split(records, 0.2)
    kept, out = ({record["text"] for record in side} for side in sides)
    assert [len(side) for side in sides] == [64, 16]
    assert (len(kept), len(out), kept & out) == (16, 4, set())


def test_labels_with_few_records_take_turns():
    records = [{"text": f"{i}", "label": f"{i % 100}"} for i in range(1000)]
    labels = [[r["label"] for r in split(records, 0.05, seed)[1]] for seed in (0, 0, 1)]
    assert [len({*names}) for names in labels] == [50, 50, 50]
    assert labels[0] == labels[1] != labels[2]


def test_limit_takes_so_many_questions():
    records = [{"question": str(i), "choices": ["a", "b"], "answer": i % 2} for i in range(20)]
    assert len({r["question"] for r in runs.select(records, 6)}) == 6


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "max_steps must be at least 1, got 0"),
        ("limit", 0, "limit must be at least 1, got 0"),
        ("learning_rate", float("nan"), "learning_rate must be a finite number above 0, got nan"),
        ("learning_rate", float("inf"), "learning_rate must be a finite number above 0, got inf"),
        ("kl_scale", -1.0, "kl_scale must be a finite number of at least 0, got -1.0"),
        ("lora_dropout", 1.0, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ("seed", -1, r"seed must be in 0\.\.2\^32 - 1, got -1"),
        ("prior_std", 0.0, "prior_std must be a finite number above 0, got 0.0"),
        ("target_modules", [], "target_modules must name at least one layer"),
        ("model", "", "model must be a name that isn't empty, got ''"),
    ],
)
def test_values_out_of_range(config, field, value, message):
    with pytest.raises(runs.RunError, match=message):
        config.with_options(**{field: value})


def test_all_values_out_of_range_at_once(config):
    with pytest.raises(runs.RunError) as caught:
        config.with_options(steps=0, lora_dropout=-1.0, prior_std=-1.0)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("records", "task", "message"),
    [
        (queries()[:2], "auto", "field 'label': all are 'refund'; there must be at least 2 labels"),
        ([{"text": t, "labels": ["x"]} for t in "ab"], "auto", "field 'labels': all records have all, such as 'x'"),
        (queries(), "choice_text", "task 'choice_text' needs records with 'question' and 'choices'"),
        (QUESTIONS, "classification", "task 'classification' needs records with 'text'"),
        ([*queries(), *QUESTIONS], "auto", ":5, 6: it has 'question', those before 'text'"),
    ],
)
def test_data_that_cannot_be_trained_on_is_found_before_the_model(config, tmp_path, records, task, message):
    file = write_jsonl(tmp_path / "mine.jsonl", records)
    with pytest.raises((runs.RunError, DataError), match=message):
        runs.train(config.with_options(data=str(file), task=task, model="./no-such-model"), progress=False)
    with pytest.raises(ValueError, match="no-such-model"):
        runs.train(config.with_options(model="./no-such-model"), progress=False)


def test_evaluation_checks_labels_and_kinds(config, tmp_path):
    run = runs.train(config, progress=False)
    with pytest.raises(runs.RunError, match=r"(?s)be measured by.*refund") as caught:
        runs.evaluate(run, [queries()[0], {"text": "x", "label": "other"}])
    assert "record 2: field 'label': 'other'" in str(caught.value)
    for records, outside in ((QUESTIONS, None), (queries(), QUESTIONS)):
        with pytest.raises(runs.RunError, match="task is classification, which needs records with 'text'"):
            runs.evaluate(run, records, outside)


def test_predictions_ask_for_no_labels(config):
    """Not even for known ones: the demo's out-of-scope queries are labelled so."""
    run = runs.train(config, progress=False)
    strange = [{"text": record["text"], "label": "out_of_scope"} for record in queries()]
    assert torch.equal(run.predict(strange, 2).log_probs, run.predict(queries(), 2).log_probs)


def test_choices_scored_by_length(config, files):
    """A run's scores are by its normalization, also once it is loaded."""
    log_probs = {}
    for normalization in ("sum", "length"):
        of = config.with_options(data=str(files["questions"]), output=f"{config.output}-{normalization}", method="lora")
        runs.train(of.with_options(normalization=normalization, steps=1, learning_rate=1e-12), progress=False)
        log_probs[normalization] = runs.load_run(of.output).predict(QUESTIONS, 0).log_probs
    assert not torch.allclose(log_probs["sum"], log_probs["length"])


@pytest.mark.parametrize(
    ("data", "labels", "message"),
    [
        ("texts", ["parcel"], r"labels must be at least 2, all different, got \['parcel'\]"),
        ("texts", ["parcel", "parcel"], "labels must be at least 2, all different"),
        ("texts", ["parcel", "invoice"], "field 'label': refund not among labels; add them to it"),
        ("questions", ["a", "b"], "choice_text has no option 'labels'"),
    ],
)
def test_labels_that_do_not_fit(config, files, data, labels, message):
    with pytest.raises(ValueError, match=message):
        runs.train(config.with_options(data=str(files[data]), labels=labels), progress=False)


def test_normalization_of_texts(config):
    with pytest.raises(ValueError, match="classification has no option 'normalization'"):
        runs.train(config.with_options(normalization="sum"), progress=False)


def test_choices_that_stand_twice_keep_their_probabilities_apart(config, files):
    run = runs.train(config.with_options(data=str(files["questions"]), steps=1), progress=False)
    (line,) = runs.describe(run, [{"id": 7, "question": "What?", "choices": ["a card", "a card", "water"]}], TWO)
    assert list(line["probabilities"]) == ["0: a card", "1: a card", "2: water"]
    assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-6)
    assert (line["id"], line["question"]) == (7, "What?")


def test_the_public_api(base, tmp_path):
    """The example of the documentation, on what a tokenizer returns."""
    from bloblora import BlobConfig, BlobTrainer, BlobTrainingArguments, bayesianize, load, predict, save

    tokenizer = AutoTokenizer.from_pretrained(base)
    texts, labels = [r["text"] for r in queries()], [0, 0, 1, 1]

    def fresh():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
        model.config.pad_token_id = tokenizer.pad_token_id
        return model

    model = with_lora(fresh(), "q_proj", "v_proj", task_type="SEQ_CLS")
    bayesianize(model, BlobConfig(prior_std=0.2, init_std=0.0025))
    rows = [
        {**tokenizer(text, padding="max_length", max_length=16), "labels": y}
        for text, y in zip(texts, labels, strict=True)
    ]
    arguments = BlobTrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=3,
        learning_rate=0.01,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    BlobTrainer(model, arguments, train_dataset=rows).train()

    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    prediction = predict(model, inputs, num_samples=5)
    assert prediction.probabilities.shape == (4, 2)
    assert torch.allclose(prediction.probabilities.sum(-1), torch.ones(4))
    assert (prediction.mutual_information > 0).any()

    save(model, tmp_path / "adapter")
    loaded = load(fresh(), tmp_path / "adapter")
    assert torch.equal(predict(loaded, inputs, num_samples=5).log_probs, prediction.log_probs)
    assert set(bloblora.__all__) >= {
        "BlobConfig",
        "bayesianize",
        "BlobTrainer",
        "predict",
        "Prediction",
        "load",
        "save",
    }
    assert tiny_causal().config.vocab_size >= len(tokenizer)
