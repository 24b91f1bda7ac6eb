"""Runs that are evaluated while they are trained, of which the best checkpoint is kept."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from bloblora import data, methods, runs
from bloblora.cli import main
from bloblora.hub import model_card
from bloblora.tasks import TaskError
from bloblora.training import DivergedError
from tests.tiny_base import QUESTIONS, queries, write_jsonl

from .test_runs import Kill, adapter_bytes

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:validation .*too few to tell:UserWarning"),
]
# Labels that contradict those of the training records: the more is learnt, the higher the NLL, so an early one is best.
WRONG = [{"text": f"{r['text']} again", "label": "parcel" if r["label"] == "refund" else "refund"} for r in queries()]
RIGHT = [{**r, "text": f"{r['text']} again"} for r in queries()]
METHODS = {
    "lora": {},
    "map": {},
    "full": {"learning_rate": 0.01},
    "mc-dropout": {},
    "ensemble": {"members": 2},
    "mixture": {"members": 2},
    "blob": {},
    "ivon": {"learning_rate": 0.3, "clip_radius": 1e-3},
    "scalabl": {},
    "distilled": {"distill_steps": 2},
    "laplace-lora": {"subset_of_weights": "last_layer"},
    "tfb": {},
    "swag": {"burn_in": 0.0, "learning_rate": 0.2},
    "c-lora": {},
}


@pytest.fixture
def config(base, tmp_path):
    def build(validation=RIGHT, records=None, **options):
        if isinstance(validation, list):
            validation = str(write_jsonl(tmp_path / "validation.jsonl", validation))
        defaults = dict(method="lora", steps=6, batch_size=2, r=2, learning_rate=0.02, eval_steps=2, head="trained")
        if "text" in (records or queries())[0]:
            defaults["template"] = "{text}"  # few tokens, which are learnt quickly
        return runs.RunConfig.of(
            data=str(write_jsonl(tmp_path / "data.jsonl", records or queries())),
            output=str(tmp_path / "run"),
            model=str(base),
            validation=validation,
            **{**defaults, **options},
        )

    return build


def validated(run_or_folder):
    training = json.loads((Path(run_or_folder) / "run.json").read_text())["training"]
    return training["validation"]


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_keeps_its_best_checkpoint(method, config):
    """The NLL of the trained run is the curve's lowest: of post-hoc methods and distillation, of what is under them."""
    c = config(WRONG, method=method, **METHODS[method])
    run = runs.train(c, progress=False)
    found = validated(c.output)
    assert found["num_examples"] == len(WRONG)
    assert 0 < found["share_of_time"] < 1
    assert [one["part"] for one in found["trainings"]] == (
        ["member_0", "member_1"] if method in ("ensemble", "mixture") else [""]
    )
    for one in found["trainings"]:
        assert [row["step"] for row in one["curve"]] == [2, 4, 6]
        best = min(one["curve"], key=lambda row: row["nll"])
        assert (one["best_step"], one["nll"], one["accuracy"]) == (best["step"], best["nll"], best["accuracy"])
        assert one["best_step"] < 6  # or nothing is tested
        assert not one["stopped_early"]
    if method not in ("distilled",):
        for predicting in (run, runs.load_run(c.output)):
            targets = torch.tensor([predicting.task.labels.index(r["label"]) for r in WRONG])
            prediction = predicting.predict(WRONG, 0)
            expected = found["trainings"][0]
            actual = -prediction.log_probabilities[torch.arange(len(WRONG)), targets].mean().item()
            assert actual == pytest.approx(expected["nll"], rel=1e-4)
            assert (prediction.labels == targets).double().mean().item() == pytest.approx(expected["accuracy"])


@pytest.mark.parametrize("method", ["blob", "ivon"])
def test_the_best_checkpoints_width_comes_back(method, config, tmp_path):
    """A run of as many steps as the best one's, on the same schedule, ends with the same bytes, Ω's too."""
    options = {"method": method, "lr_scheduler_type": "constant", "warmup_steps": 0, **METHODS[method]}
    c = config(WRONG, **options)
    runs.train(c, progress=False)
    (one,) = validated(c.output)["trainings"]
    short = config(None, **options, eval_steps=None).with_options(
        output=str(tmp_path / "short"), steps=one["best_step"]
    )
    runs.train(short, progress=False)
    assert one["best_step"] < 6
    assert adapter_bytes(c.output) == adapter_bytes(short.output)


def test_swags_best_checkpoint_has_two_iterates(config, tmp_path):
    """Its mean and its width are those of a run that ends there, though weights of the burn-in answer better."""
    options = dict(method="swag", eval_steps=1, learning_rate=0.2, collect_rate=1.0, warmup_steps=0, covariance_rank=2)
    c = config(WRONG, **options, num_iterates=4, burn_in=0.34)
    runs.train(c, progress=False)
    (one,) = validated(c.output)["trainings"]
    assert min(one["curve"], key=lambda row: row["nll"])["step"] < 4
    assert one["best_step"] == 4  # after the second of 3, 4, 5 and 6
    short = config(None, **options, num_iterates=2, burn_in=0.5).with_options(
        output=str(tmp_path / "short"), steps=4, eval_steps=None
    )
    runs.train(short, progress=False)
    assert adapter_bytes(c.output) == adapter_bytes(short.output)
    columns = [(Path(output) / "swag.safetensors").read_bytes() for output in (c.output, short.output)]
    assert columns[0] == columns[1]


WRONG_ANSWERS = [{**q, "answer": 1 - q["answer"], "question": f"Again: {q['question']}"} for q in QUESTIONS]


@pytest.mark.filterwarnings("ignore:training did not help", "ignore:the model has learned nothing")
def test_a_model_that_can_answer_is_evaluated_before_its_training(config, tmp_path):
    """Its NLL is that of the base, and the training is the same to the byte as without."""
    options = dict(method="blob", lr_scheduler_type="constant", warmup_steps=0)
    c = config(WRONG_ANSWERS, QUESTIONS, **options)
    runs.train(c, progress=False)
    (one,) = validated(c.output)["trainings"]
    assert one["before"]["step"] == 0
    assert [row["step"] for row in one["curve"]] == [2, 4, 6]
    options |= {"output": str(tmp_path / "short"), "steps": one["best_step"]}
    short = config(None, QUESTIONS, eval_steps=None).with_options(**options)
    runs.train(short, progress=False)
    assert adapter_bytes(c.output) == adapter_bytes(short.output)

    still = c.with_options(output=str(tmp_path / "still"), learning_rate=1e-12)
    runs.train(still, progress=False)
    (slow,) = validated(still.output)["trainings"]
    assert slow["before"] == one["before"]
    assert slow["nll"] == pytest.approx(slow["before"]["nll"], rel=1e-4)


def test_a_training_that_does_not_help_says_so(config, capsys):
    c = config(WRONG_ANSWERS, QUESTIONS, learning_rate=0.05)
    with pytest.warns(UserWarning, match=r"training did not help: the validation NLL was (\S+) before it, and"):
        runs.train(c, progress=False)
    main(["evaluate", c.output, "--data", c.validation])
    assert "warning: this run: training did not help" in capsys.readouterr().err


def test_a_fresh_head_cannot_answer_before_its_training(config):
    c = config(RIGHT)
    runs.train(c, progress=False)
    assert validated(c.output)["trainings"][0]["before"] is None


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The output of a configuration's undisturbed run, trained once for each method and patience."""
    outputs = {}

    def whole_run(c, *key):
        if key not in outputs:
            outputs[key] = str(tmp_path_factory.mktemp("whole") / "run")
            runs.train(c.with_options(output=outputs[key]), progress=False)
        return outputs[key]

    return whole_run


STOPPED = [(1, None), (3, None), (4, None), (5, None), (4, 1), (3, 2), (5, 2)]
CORNERS = {("ensemble", 3, None), ("ensemble", 5, 2), ("swag", 4, None), ("swag", 3, 2)}


@pytest.mark.parametrize(
    ("method", "step", "patience"),
    [
        *(("blob", *stopped) for stopped in STOPPED),
        *sorted(CORNERS, key=str),
        *(
            pytest.param(*combination, marks=pytest.mark.long)
            for combination in ((method, *stopped) for method in ("ensemble", "swag") for stopped in STOPPED)
            if combination not in CORNERS
        ),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bytes_and_curve(method, step, patience, config, whole_run):
    options = {"method": method, "patience": patience, **METHODS[method]}
    whole = whole_run(config(WRONG, **options), method, patience)
    expected = validated(whole)
    c = config(WRONG, **options)
    with pytest.raises(KeyboardInterrupt):
        runs.train(c, progress=False, callbacks=[Kill(step)])
    runs.train(c, progress=False)
    found = validated(c.output)
    assert adapter_bytes(c.output) == adapter_bytes(whole)
    kept = ("best_step", "stopped_early", "curve", "nll")
    assert [[one[k] for k in kept] for one in found["trainings"]] == [
        [one[k] for k in kept] for one in expected["trainings"]
    ]


class KillAfterEvaluation(TrainerCallback):
    def __init__(self, event, step):
        setattr(self, event, lambda args, state, control, **_: self._kill(state, step))

    def _kill(self, state, step):
        if state.global_step == step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("event", ["on_evaluate", "on_save", "on_train_end"])
def test_a_kill_about_the_evaluation_that_ends_patience(event, config, whole_run):
    """Between evaluation and save, after the save, and when all is done."""
    options = {"method": "blob", "patience": 1}
    whole = whole_run(config(WRONG, **options), "blob", 1)
    (expected,) = validated(whole)["trainings"]
    assert expected["stopped_early"]
    assert [row["step"] for row in expected["curve"]] == [2, 4]
    c = config(WRONG, **options)
    with pytest.raises(KeyboardInterrupt):
        runs.train(c, progress=False, callbacks=[KillAfterEvaluation(event, 4)])
    runs.train(c, progress=False)
    (found,) = validated(c.output)["trainings"]
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}
    assert adapter_bytes(c.output) == adapter_bytes(whole)


class LastWeights(TrainerCallback):
    def on_step_end(self, args, state, control, model, **_):
        if state.global_step == args.max_steps:
            self.found = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", ["blob", "mc-dropout"])
def test_validation_leaves_the_training_as_it_is(method, config, tmp_path):
    """Evaluations draw no noise of the training's."""
    seen = []
    for validation, options in ((WRONG, {"eval_num_samples": 3}), (None, {"eval_steps": None})):
        c = config(validation, method=method, **options).with_options(output=str(tmp_path / str(validation is None)))
        seen.append(LastWeights())
        runs.train(c, progress=False, callbacks=[seen[-1]])
    assert [name for name, p in seen[0].found.items() if not torch.equal(p, seen[1].found[name])] == []


def test_a_share_is_held_out_per_label(config):
    c = config(0.5, method="blob")
    run = runs.train(c, progress=False)
    assert (run.training["num_examples"], validated(c.output)["num_examples"]) == (2, 2)
    assert runs.load_run(c.output).config.validation == 0.5


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"eval_steps": 0.5}, [3, 6]),
        ({"eval_steps": 4}, [4, 6]),
        ({"eval_steps": 1000}, [6]),
        ({"eval_strategy": "epoch", "epochs": 3}, [2, 4, 6]),
    ],
    ids=str,
)
def test_how_often(options, steps, config):
    options = {"steps": None, **options} if "epochs" in options else options
    c = config(RIGHT, method="blob", **options)
    runs.train(c, progress=False)
    (one,) = validated(c.output)["trainings"]
    assert [row["step"] for row in one["curve"]] == steps


def test_copies_that_a_share_cannot_keep_apart_are_said(config):
    one = [{"text": "the same", "label": label} for label in ("parcel", "refund")]
    c = config(0.25, method="lora").with_options(data=one * 4)
    with pytest.warns(UserWarning, match="2 of 2 records are training records too, .*: remove copies from the data"):
        runs.train(c, progress=False)


def test_a_share_on_the_command_line(config):
    c = config(None, eval_steps=None)
    places = ["--data", c.data, "--model", c.model, "--output", c.output]
    main(["train", *places, "--validation", "0.5", "--steps", "2", "--batch-size", "2", "--method", "lora", "--r", "2"])
    assert validated(c.output)["num_examples"] == 2
    assert runs.open_run(c.output).config.validation == 0.5


def test_the_default_is_some_fifteen_evaluations(config):
    options = config(eval_steps=None)
    assert options.validation_options(500)["eval_steps"] == options.validation_options(500)["save_steps"] == 34
    assert options.validation_options(10)["eval_steps"] == 1
    assert config(0, eval_steps=None).validation_options(500) == {}


@pytest.mark.parametrize(
    "options",
    [{"method": "lora", "temperature_scaling": True}, {"method": "laplace-lora", "holdout": 0.5}],
    ids=str,
)
def test_validation_records_are_the_held_out_ones(options, config):
    run = runs.train(config(RIGHT, **options), progress=False)
    assert run.training["num_examples"] == len(queries())
    assert run.training["validation"]["num_examples"] == len(RIGHT)


@pytest.mark.parametrize("method", ["blob", "lora"])
@pytest.mark.parametrize(
    ("records", "validation"), [(queries(), RIGHT), (QUESTIONS, QUESTIONS[1:])], ids=["text", "choice"]
)
@pytest.mark.filterwarnings("ignore:validation .*training records too:UserWarning")
def test_the_trunk_cache_holds_validation_too(method, records, validation, config, tmp_path):
    plain = config(validation, records, method=method, top_blocks=1, eval_num_samples=2)
    cached = plain.with_options(output=str(tmp_path / "cached"), trunk_cache=str(tmp_path / "cache"))
    for c in (plain, cached):
        runs.train(c, progress=False)
    curves = [[row["nll"] for row in validated(c.output)["trainings"][0]["curve"]] for c in (plain, cached)]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert len([*(tmp_path / "cache").glob("*.npy")]) == 1


def test_the_trunk_cache_and_a_temperature(config, tmp_path):
    c = config(RIGHT, temperature_scaling=True, top_blocks=1, trunk_cache=str(tmp_path / "cache"))
    assert runs.train(c, progress=False).sampler.temperature > 0


def test_text_has_no_accuracy(config):
    records = [{"prompt": r["text"], "response": r["label"]} for r in queries()]
    c = config([{"prompt": r["text"], "response": r["label"]} for r in RIGHT], records, method="blob")
    runs.train(c, progress=False)
    (one,) = validated(c.output)["trainings"]
    assert one["accuracy"] is None
    assert all(row.keys() == {"step", "nll"} for row in one["curve"])


def test_the_command_line_says_which_checkpoint(config, capsys):
    c = config(WRONG)
    options = ["--eval-steps", "2", "--steps", "6", "--batch-size", "2", "--method", "lora", "--patience", "1"]
    places = ["--data", c.data, "--validation", c.validation, "--model", c.model, "--output", c.output]
    main(["train", *places, *options, "--learning-rate", "0.02"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("validation"))
    (one,) = validated(c.output)["trainings"]
    found = re.fullmatch(
        r"validation: best at step 2 \(stopped at 4\), NLL (.*), accuracy (.*); (.*)% of the time", line
    )
    assert found, line
    assert float(found[1]) == pytest.approx(one["nll"], abs=1e-4)
    card = str(model_card(c.output))
    assert "](validation.png)" in card
    assert "| validation | validation.jsonl |" in card
    assert (Path(c.output) / "validation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("validation", "options", "message"),
    [
        (1.0, {}, r"validation must be a file, NAME:split, or a share in \[0, 1\), got 1.0"),
        (-0.1, {}, r"a share in \[0, 1\), got -0.1"),
        (float("nan"), {}, r"a share in \[0, 1\), got nan"),
        ("", {}, "validation must be a name that isn't empty"),
        (0.1, {"patience": 0}, "patience must be at least 1, got 0"),
        (0.1, {"save_steps": 2}, "save_steps: with validation a checkpoint is written at each evaluation"),
        (0.1, {"eval_delay": 2}, "eval_delay isn't offered with validation"),
        (0.1, {"metric_for_best_model": "f1"}, "metric_for_best_model isn't offered with validation"),
        (0.1, {"method": "tfb", "start_from": "a"}, "validation: nothing is trained with start_from and method 'tfb'"),
        (0.1, {"eval_strategy": "no"}, "eval_strategy must be 'steps' or 'epoch' with validation"),
        (0, {"eval_steps": 2}, "eval_steps is for validation records, and there are none: give validation"),
        (0, {"eval_steps": None, "eval_strategy": "steps"}, "eval_strategy is for validation records"),
        (0, {"eval_steps": None, "load_best_model_at_end": True}, "load_best_model_at_end is for validation"),
        (0, {"eval_steps": None, "patience": 2}, "patience is for validation records"),
    ],
    ids=str,
)
def test_wrong_options(validation, options, message, config):
    with pytest.raises(runs.RunError, match=message):
        config(validation, **options)


@pytest.mark.parametrize(
    ("validation", "error", "message"),
    [
        (0.01, runs.RunError, "validation 0.01 of 4 records leaves no validation record"),
        ("nowhere.jsonl", data.DataError, "validation 'nowhere.jsonl': data 'nowhere.jsonl': no such file"),
        ("support_desk:nowhere", data.DataError, "validation .*split 'nowhere' is not one of"),
        ([], data.DataError, "validation .*there are no records in it"),
        (QUESTIONS, runs.RunError, "validation .*must have records with 'text', as the training data, not"),
        ([*RIGHT, {"text": "a", "label": "cards"}], runs.RunError, "field 'label': 'cards' not among the training"),
        ([{"text": "a"}], data.DataError, "validation .*field 'label': missing"),
    ],
    ids=["no share", "no file", "no split", "empty", "kind", "label", "no label"],
)
def test_wrong_records_are_known_before_the_model_is_loaded(validation, error, message, config, tmp_path):
    c = config(validation).with_options(model=str(tmp_path / "no model"))
    with pytest.raises(error, match=message):
        runs.train(c, progress=False)


def test_records_that_do_not_fit_the_task(config):
    blank = [{**q, "question": "a _ b", "choices": ["x", "y"], "answer": 0} for q in QUESTIONS]
    with pytest.raises(TaskError, match=r"validation .*record 1: "):
        runs.train(config(QUESTIONS, blank), progress=False)


def test_leakage_is_counted_and_few_records_are_said(config):
    few = config(RIGHT)
    with pytest.warns(UserWarning, match=r"validation .*: 4 records are too few .*\(standard error .* 0.25\)"):
        runs.train(few, progress=False)
    leaked = config([*queries()[:3], *RIGHT]).with_options(output=few.output + "-leaked")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "validation .*too few")
        with pytest.warns(UserWarning, match="3 of 7 records are training records too"):
            runs.train(leaked, progress=False)


def test_other_validation_records_are_another_run(config):
    c = config(RIGHT)
    with pytest.raises(KeyboardInterrupt):
        runs.train(c, progress=False, callbacks=[Kill(3)])
    write_jsonl(Path(c.validation), WRONG)
    with pytest.raises(runs.RunError, match="whose validation records were others"):
        runs.train(c, progress=False)
    moved = write_jsonl(Path(c.validation).with_name("moved.jsonl"), RIGHT)
    runs.train(c.with_options(validation=str(moved)), progress=False)


class Break(TrainerCallback):
    """Makes a weight NaN, after the check of the gradients: the next forward is that of the evaluation."""

    def on_step_end(self, args, state, control, model, **_):
        if state.global_step == 2:
            with torch.no_grad():
                next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(float("nan"))


def test_a_validation_loss_that_is_nan_stops_the_training(config):
    with pytest.raises(DivergedError, match=r"eval_loss is not finite at step 2, first in the weight .*lora_B"):
        runs.train(config(RIGHT), progress=False, callbacks=[Break()])
