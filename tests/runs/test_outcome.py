"""What is left to the data, what a training says before it starts, and how a person hears that it ended badly."""

import json
import logging
import re

import pytest

from bloblora import runs
from bloblora.cli import main
from bloblora.hub import model_card
from bloblora.runs.automatic import left_open, resolved
from bloblora.runs.selection import hold_out
from tests.tiny_base import QUESTIONS, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")


def records(count, labels=4):
    return [{"text": f"query {i}", "label": f"label {i % labels}"} for i in range(count)]


def learnable(count):
    words = ("money", "parcel")
    return [{"text": f"{words[i % 2]} {i}", "label": words[i % 2]} for i in range(count)]


def given(**options):
    return runs.RunConfig.of(data="data.jsonl", output="run", **options)


@pytest.mark.parametrize(
    ("count", "labels", "held_out", "temperature"),
    [
        (40, 4, 0, False),
        (60, 4, 12, True),
        (200, 4, 40, True),
        (300, 150, 60, True),
        (300, 300, 0, False),
        (10_000, 4, 500, True),
        (10_000, 1000, 500, True),
    ],
)
def test_a_share_is_held_out_where_it_is_of_use(count, labels, held_out, temperature):
    rows = records(count, labels)
    config = resolved(given(), rows, 0)
    kept, validation = hold_out(config, config.build_method(), rows)
    assert (len(validation), config.temperature_scaling) == (held_out, temperature)
    assert len(kept) == count - held_out
    assert resolved(config, rows, 0) == config
    other = hold_out(config.with_options(seed=1), config.build_method(), rows)[1]
    assert (other == validation) == (not held_out)


@pytest.mark.parametrize(
    "options",
    [
        {"validation": 0},
        {"save_steps": 5},
        {"eval_strategy": "no"},
        {"method": "laplace-lora", "holdout": 0.2},
        {"method": "tfb", "start_from": "runs/lora"},
    ],
    ids=str,
)
def test_other_options_leave_no_room_for_a_share(options):
    assert not resolved(given(**options), records(200), 0).validation


@pytest.mark.parametrize(
    ("count", "options", "width"),
    [
        (199, {"validation": 0}, "none"),
        (200, {"validation": 0}, "auto"),
        (240, {}, "none"),  # of which 48 are held out
        (260, {}, "auto"),
        (20, {"factors": "none"}, "auto"),
        (20, {"head_prior_std": 0.1}, 0.1),
        (20, {"method": "mixture"}, "none"),
        (20, {"method": "lora"}, None),
    ],
)
def test_a_head_of_few_records_is_no_gaussian(count, options, width):
    options = {"head": "trained", **options}
    config = resolved(given(**options), records(count), 0)
    assert config.value("head_prior_std") == width
    assert resolved(config, records(count), 0) == config
    if width == "none":
        assert "head_prior_std" in left_open(given(**options))
    questions = [{"question": "a", "choices": ["b", "c"], "answer": 0}] * count
    asked = given(**options)
    assert resolved(asked, questions, 0).value("head_prior_std") == asked.value("head_prior_std")


@pytest.mark.parametrize(
    ("options", "head"),
    [
        ({}, "class_means"),
        ({"method": "mixture"}, "class_means"),
        ({"factors": "A"}, "class_means"),
        ({"head": "trained"}, "trained"),
        ({"method": "lora"}, "trained"),
        ({"preset": "paper"}, "trained"),
        ({"factors": "none"}, "trained"),
        ({"head_prior_std": 0.1}, "trained"),
        ({"start_from": "runs/a"}, "trained"),
        ({"prior_from": "runs/a"}, "trained"),
        ({"torch_compile": True}, "trained"),
    ],
)
def test_a_head_is_of_class_means_where_nothing_says_how_it_is(options, head):
    config = resolved(given(**options), records(300), 0)
    assert config.value("head") == head
    assert (config.value("head_prior_std") == "none") == (head == "class_means" or "preset" in options)
    assert ("prior_std" in given(**options).search_space(labels=True)) == (
        head == "class_means" or options.get("preset") == "paper"
    )
    questions = [{"question": "a", "choices": ["b", "c"], "answer": 0}] * 300
    assert resolved(given(**options), questions, 0).value("head") == "trained"


def test_records_of_one_label_each_have_no_class_means_nor_have_very_many():
    alone = [{"text": f"t {i}", "label": f"l {i}"} for i in range(30)]
    assert resolved(given(), alone, 0).value("head") == "trained"
    heads = [resolved(given(), records(count), 0).value("head") for count in (10_000, 10_001)]
    assert heads == ["class_means", "trained"]


def test_records_of_their_own_can_fit_a_temperature():
    config = given(validation="other.jsonl")
    assert [resolved(config, records(20), count).temperature_scaling for count in (9, 10)] == [False, True]
    assert not resolved(given(validation="other.jsonl", temperature_scaling=False), records(20), 30).temperature_scaling
    prompts = [{"prompt": "a", "response": "b"}] * 200
    assert resolved(given(), prompts, 0).validation == 0.2
    assert not resolved(given(), prompts, 0).temperature_scaling


def test_steps_grow_with_the_root_of_the_records_and_see_each_once():
    def steps(count, rows=records, **options):
        return resolved(given(validation=0, **options), rows(count), 0).value("max_steps")

    assert [steps(count) for count in (100, 400, 10_000, 160_000)] == [200, 400, 2000, 10_000]
    assert steps(400, batch_size=8) == steps(400, batch_size=4, gradient_accumulation_steps=2) == 800
    assert steps(400, lambda count: QUESTIONS * (count // 2)) == 100  # nothing is fresh
    assert steps(400, steps=7) == 7
    assert resolved(given(epochs=2), records(400), 0).value("max_steps") == -1


def test_the_learning_rate_falls_with_the_width_of_the_base(base, tmp_path):
    def rate(**options):
        return resolved(given(**options), records(20), 0).value("learning_rate")

    def of_width(**options):
        (tmp_path / "config.json").write_text(json.dumps(options))
        return rate(model=str(tmp_path))

    assert (rate(), rate(learning_rate=0.5), rate(method="full")) == (1.3e-3, 0.5, 5e-5)
    assert of_width(hidden_size=2000) == of_width(n_embd=2000) == of_width(text_config={"d_model": 2000}) == 5e-4
    assert of_width(hidden_size=4096) == 2.9e-4
    assert of_width() == 5e-4  # where nothing says how wide it is


@pytest.fixture
def trained(base, tmp_path):
    def build(rows=None, **options):
        data = write_jsonl(tmp_path / "data.jsonl", rows or records(60))
        settings = {"model": str(base), "output": str(tmp_path / "run"), "batch_size": 4, "r": 2, "steps": 4, **options}
        return runs.train(runs.RunConfig.of(data=str(data), **settings), progress=False)

    return build


@pytest.mark.parametrize(("capability", "native"), [("avx512_bf16", "bfloat16"), ("avx2", "float32")])
def test_the_dtype_is_one_that_model_and_device_have(monkeypatch, base, capability, native):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {capability: True})
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def dtype(**options):
        return resolved(given(**options), records(20), 0).dtype

    assert (dtype(), dtype(dtype="float16"), dtype(model=str(base))) == (native, "float16", "float32")
    # AdamW's steps are lost in a bfloat16 weight
    assert dtype(method="full") == "float32"


def test_what_was_read_is_said_first(trained, caplog, tmp_path):
    rows = [*records(60), {"text": "one of its kind and a little longer than the others", "label": "rare"}]
    with caplog.at_level(logging.INFO, "bloblora"):
        run = trained(rows, method="lora")
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    longest = len(run.tokenizer(run.task.template.format(text=rows[-1]["text"]))["input_ids"])
    assert lines[0] == (
        f"read 61 records with 5 labels, 1 to 15 each, the rarest 'rare'; the longest has {longest} tokens"
    )
    assert lines[1] == "12 records choose the checkpoint, and fit the temperature; 49 are trained on"
    assert lines[2] == "4 steps of 4 records: 0.3 passes over them; base model in float32"
    assert lines[3] == (
        'a text is read in the template This sentence: "{text}" means in one word: " '
        "(`--template '{text}'` has the text alone)"
    )
    assert not any("Gaussian" in line for line in lines)
    with caplog.at_level(logging.INFO, "bloblora"):
        trained(rows, method="blob", output=str(tmp_path / "blob"))
        trained(rows, method="blob", output=str(tmp_path / "trained"), head="trained")
    found = [record.getMessage() for record in caplog.records]
    assert "no head is trained: it is made of the means of the classes (`--head trained` trains one)" in found
    assert "the Gaussian is over LoRA's A, the head is a point (by default below 200 training records)" in found


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        (records(20), {}, ", as a fifth must be at least 10 records, and each label keeps one; 20 are trained on"),
        (records(60, 60), {}, ", as a fifth must be at least 10 records, and each label keeps one; 60 are trained on"),
        (records(60), {"save_steps": 2}, ", by the other options; 60 are trained on"),
        (records(60), {"validation": 0}, "; 60 are trained on"),
    ],
)
def test_that_nothing_is_held_out_is_said(trained, caplog, rows, options, said):
    with caplog.at_level(logging.INFO, "bloblora"):
        trained(rows, method="lora", **options)
    assert f"no records are held out{said}" in [record.getMessage() for record in caplog.records]


def test_the_held_out_part_is_measured(trained):
    run = trained(temperature_scaling=True, head="trained")  # class means are then joined by it
    found = run.training["held_out"]
    assert found["num_examples"] == 12
    assert found["by_num_samples"].keys() == {"0", "10"}
    _, validation = hold_out(run.config, run.method, records(60))
    for count, values in found["by_num_samples"].items():
        options = runs.PredictionOptions(samples=int(count))
        expected = runs.evaluate(runs.load_run(run.config.output), validation, options=options)
        assert values == pytest.approx({name: expected[name] for name in values})


def test_a_run_that_learned_nothing_says_so_everywhere(trained, tmp_path, capsys):
    with pytest.warns(UserWarning, match="the model has learned nothing that helps: the NLL of held-out records is"):
        run = trained(learning_rate=1e-9, head="trained")
    (problem,) = [one for one in run.training["warnings"] if "learned nothing that helps" in one]
    bound = re.search(r"and (\S+) without looking at the input", problem)
    assert float(bound[1]) == pytest.approx(1.386, abs=1e-3)  # log 4
    folder, data = str(tmp_path / "run"), str(write_jsonl(tmp_path / "test.jsonl", records(8)))
    for command in (["evaluate", folder, "--data", data], ["predict", folder, "--input", data]):
        main(command)
        assert f"warning: this run: {problem}" in capsys.readouterr().err.splitlines()
    assert f"- **Training ended badly**: {problem}" in str(model_card(folder))


def test_records_that_chose_the_checkpoint_calibrate_nothing(trained, tmp_path, capsys):
    other = str(write_jsonl(tmp_path / "other.jsonl", records(60)[::-1]))
    trained(method="lora", validation=other)
    with pytest.raises(SystemExit):
        main(["calibrate", str(tmp_path / "run"), "--data", other])
    said = "the run has seen 60 of the 60 records: it was trained on them, or they chose its checkpoint"
    assert said in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:the model has learned nothing")
def test_a_training_that_was_too_short_says_so(trained):
    with pytest.warns(UserWarning, match=r"was still falling at the last step, from \S+ to \S+: train longer"):
        trained(learnable(60), method="lora", learning_rate=0.01, lr_scheduler_type="constant", steps=8)


@pytest.mark.filterwarnings("ignore:min_std:UserWarning")
def test_draws_that_do_harm_are_said(trained):
    with pytest.warns(UserWarning, match="10 weight samples answer held-out records worse than the mean weights do"):
        trained(
            learnable(60),
            method="tfb",
            temperature_scaling=False,
            min_std=5.0,
            max_std=6.0,
            steps=30,
            learning_rate=0.02,
        )


def test_one_voice(trained, tmp_path, capfd, base):
    data = write_jsonl(tmp_path / "voice.jsonl", records(60))
    shape = ["--model", str(base), "--r", "2", "--batch-size", "4", "--steps", "2", "--learning-rate", "1e-9"]
    shape += ["--head", "trained"]
    main(["train", "--data", str(data), "--output", str(tmp_path / "voice"), *shape])
    error = capfd.readouterr().err
    assert "read 60 records with 4 labels, 15 each" in error
    lines = [line for line in error.splitlines() if "learned nothing that helps" in line]
    assert len(lines) == 1
    assert lines[0].startswith("warning: ")
    assert "UserWarning" not in error
    assert json.loads((tmp_path / "voice/run.json").read_text())["training"]["warnings"]
