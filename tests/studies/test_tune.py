import re
from dataclasses import replace

import pytest

from bloblora import studies
from bloblora.cli import main
from bloblora.runs import RunError
from bloblora.studies.tune import _ranges, jobs
from tests.tiny_base import queries


def test_a_search_goes_on_and_keeps_to_its_constraint(content, write, tmp_path):
    content["datasets"]["desk"]["test"] = "missing.jsonl"  # test data are never read
    study = studies.read_study(write(content))
    options = dict(
        method="wide blob",
        aim="ece",
        within=0.01,
        ranges={"prior_std": (0.1, 1.0), "learning_rate": (1e-4, 5e-2)},
        data=tmp_path,
    )
    first = studies.tune(study, "desk", tmp_path / "search", trials=2, **options)
    told = []
    trials = studies.tune(study, "desk", tmp_path / "search", trials=4, reported=told.append, **options)
    assert [trial.number for trial in told] == [2, 3]
    assert {t.number: dict(t.options) for t in first}.items() <= {t.number: dict(t.options) for t in trials}.items()
    assert len({trial.options["prior_std"] for trial in trials}) == 4
    assert all(0.1 <= trial.options["prior_std"] <= 1.0 for trial in trials)
    baseline = studies.read_result(tmp_path / "search", "desk--lora--seed0").metrics["validation"]["4"]["accuracy"]
    for trial in trials:
        assert trial.feasible == (trial.metrics["accuracy"] >= baseline - 0.01)
    feasible = [trial for trial in trials if trial.feasible]
    assert trials[: len(feasible)] == sorted(feasible, key=lambda trial: trial.metrics["ece"])


def test_an_accuracy_at_the_limit_is_within_it(content, write, tmp_path, monkeypatch):
    accuracy = {"lora": 0.8, "wide blob": 0.7}
    monkeypatch.setitem(
        studies.tune.__globals__, "_metrics", lambda job, _: {"accuracy": accuracy[job.label], "ece": 0.1}
    )
    options = dict(method="wide blob", aim="ece", trials=1, data=tmp_path)
    for within, feasible in ((0.1, True), (0.099, False)):
        (trial,) = studies.tune(
            studies.read_study(write(content)), "desk", tmp_path / f"{within}", within=within, **options
        )
        assert trial.feasible == feasible


def test_trials_of_another_study_do_not_count(content, write, tmp_path):
    options = dict(method="wide blob", ranges={"prior_std": (0.1, 1.0)}, data=tmp_path, trials=1)
    study, output = studies.read_study(write(content)), tmp_path / "search"
    (trial,) = studies.tune(study, "desk", output, **options)
    assert studies.tune(study, "desk", output, **options) == [trial]
    with pytest.raises(RunError, match="its trials are of another seed or other samples; choose another folder"):
        studies.tune(study, "desk", output, seed=7, **options)
    content["train"]["steps"] = 3
    with pytest.raises(RunError, match="trial0 is the result of another configuration"):
        studies.tune(studies.read_study(write(content)), "desk", output, **options)


def test_searches_in_one_folder_are_told_apart(content, write, tmp_path):
    study, output = studies.read_study(write(content)), tmp_path / "search"
    options = dict(method="wide blob", trials=1, data=tmp_path)
    first = [studies.tune(study, "desk", output, ranges={"prior_std": (0.1, high)}, **options) for high in (1.0, 0.5)]
    assert first[0][0].options != first[1][0].options
    assert len([*(output / "runs").glob("*trial0.json")]) == 2
    again = [studies.tune(study, "desk", output, ranges={"prior_std": (0.1, high)}, **options) for high in (1.0, 0.5)]
    assert again == first


def test_a_trial_that_diverges_does_not_end_the_search(content, write, tmp_path):
    study = studies.read_study(write(content))
    wide = dict(method="wide blob", ranges={"learning_rate": (1e-28, 1e28)}, data=tmp_path)
    with pytest.warns(UserWarning, match=r"trial \d: .* is not finite at step \d"):
        trials = studies.tune(study, "desk", tmp_path / "search", trials=4, **wide)
    assert 0 < len(trials) < 4
    beyond = wide | {"ranges": {"learning_rate": (1e28, 1e30)}}
    with pytest.raises(RunError, match="all of 2 trials diverged; search lower learning rates"):
        studies.tune(study, "desk", tmp_path / "beyond", trials=2, **beyond)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])  # of a kill too, optuna's journal has no end
def test_a_trial_that_was_stopped_goes_on(stop, content, write, tmp_path, monkeypatch):
    """With its own setting and in its own folder, where its checkpoints are."""
    study = studies.read_study(write(content))
    options = dict(method="wide blob", ranges={"prior_std": (0.1, 1.0)}, trials=2, data=tmp_path)
    run, tried = jobs.run, []
    errors = iter([None, stop(), stop(), None])

    def stopped(job, *args, **kwargs):
        tried.append((job.config.value("prior_std"), job.config.output))
        if (error := next(errors)) is not None:
            raise error
        return run(job, *args, **kwargs)

    monkeypatch.setattr(jobs, "run", stopped)
    for _ in range(2):
        with pytest.raises(stop):
            studies.tune(study, "desk", tmp_path / "search", **options)
    found = studies.tune(study, "desk", tmp_path / "search", **options)
    assert len(found) == 2
    assert len({*tried[:2]}) == 2
    assert tried[1] == tried[2] == tried[3]
    assert studies.tune(study, "desk", tmp_path / "search", **options) == found


def test_trials_that_fail_do_not_count(content, write, tmp_path, monkeypatch, capfd):
    study = studies.read_study(write(content))
    options = dict(method="wide blob", ranges={"prior_std": (0.1, 1.0)}, trials=1, data=tmp_path)
    run, errors = jobs.run, iter([OSError("disk full"), None])

    def failing(*args, **kwargs):
        if (error := next(errors)) is not None:
            raise error
        return run(*args, **kwargs)

    monkeypatch.setattr(jobs, "run", failing)
    with pytest.raises(OSError, match="disk full"):
        studies.tune(study, "desk", tmp_path / "failing", **options)
    assert len(studies.tune(study, "desk", tmp_path / "failing", **options)) == 1
    assert "Trial" not in capfd.readouterr().err


def test_whole_numbers_are_searched_as_such(content, write, tmp_path):
    options = dict(method="wide blob", ranges={"r": (1.0, 4.0), "lora_alpha": (1, 64)}, trials=2, data=tmp_path)
    for trial in studies.tune(studies.read_study(write(content)), "desk", tmp_path / "search", **options):
        assert {name: type(value) for name, value in trial.options.items()} == {"r": int, "lora_alpha": int}
        assert 1 <= trial.options["r"] <= 4


def test_an_accuracy_that_no_trial_reaches(content, write, tmp_path, capsys):
    file = str(write(content))
    arguments = ["--data", str(tmp_path), "--method", "wide blob", "--aim", "ece", "--within", "-2", "--trials", "2"]
    with pytest.raises(SystemExit):
        main(["tune", file, "--dataset", "desk", "--output", str(tmp_path / "search"), *arguments])
    told = capsys.readouterr()
    assert "no trial is within -2.0 of the accuracy of 'lora'; trial" in told.err
    assert told.out == ""


@pytest.mark.parametrize("method", ["blob", "mc-dropout", "tfb", "swag", "ivon", "scalabl", "c-lora", "full"])
@pytest.mark.parametrize("labels", [True, False])
def test_the_default_ranges_hold_the_methods_defaults(method, labels, content, write, tmp_path):
    content["methods"][method] = {}
    content["datasets"]["desk"]["train"].pop("learning_rate")
    job = studies.read_study(write(content)).job("desk", "m", method, 0, tmp_path, tmp_path)
    options = job.config.build_method().options()
    ranges = _ranges(job, None, labels)
    assert "learning_rate" in ranges
    if method == "blob":
        assert ranges.keys() - {"learning_rate"} == {"prior_std", "kl_scale"}  # over A, under class means too
        trained = replace(job, config=job.config.with_options(head="trained"))
        over_head = {"head_prior_std", "head_kl_scale"} if labels else {"prior_std", "kl_scale"}
        assert _ranges(trained, None, labels).keys() - {"learning_rate"} == over_head
    for name, (low, high) in ranges.items():
        default = options[name].default if name in options else job.config.value(name)
        assert isinstance(default, str) or low < default < high


def test_what_cannot_be_searched_is_named(content, write, tmp_path):
    study = studies.read_study(write(content))
    for changed, message in (
        ({"dataset": "none"}, "data set 'none' is not one of the study's: desk"),
        ({"method": "map"}, "method 'map' is not one of the study's: lora, wide blob"),
        ({"ranges": {"members": (1, 2)}}, "method 'blob' has no option 'members'"),
        ({"ranges": {"prior_std": (2, 1)}}, "prior_std: 2, 1; the first must be above 0"),
        ({"ranges": {"lora_dropout": (0.1, 3.0)}}, r"lora_dropout must be in \[0, 1\), got 3.0"),
        ({"ranges": {"batch_size": (1.5, 4)}}, "batch_size: 1.5, 4; both must be whole numbers"),
        ({"ranges": {"use_rslora": (0.1, 1)}}, "use_rslora: 0.1, 1; it isn't a number; searched by default: "),
    ):
        arguments = {"dataset": "desk", "method": "wide blob", "data": tmp_path, **changed}
        with pytest.raises(RunError, match=message):
            studies.tune(study, output=tmp_path / "search", **arguments)
    content["datasets"]["desk"].pop("validation")
    with pytest.raises(RunError, match="desk: field 'validation' is missing"):
        studies.tune(studies.read_study(write(content)), "desk", tmp_path / "search", method="wide blob", data=tmp_path)


def test_a_search_has_one_model_and_one_budget(content, write, tmp_path):
    options = dict(method="wide blob", ranges={"prior_std": (0.1, 1.0)}, trials=1, data=tmp_path)
    content["budgets"] = [3]
    studies.tune(studies.read_study(write(content)), "desk", tmp_path / "search", **options)
    (trial,) = (tmp_path / "search" / "runs").glob("*trial0.json")
    assert studies.read_result(tmp_path / "search", trial.stem).training["curve"][-1][0] == 3
    for name, several in (("budgets", [3, 5]), ("models", [*content["models"], "smollm2-135m"])):
        study = studies.read_study(write(content | {name: several}))
        message = f"{name}: {', '.join(map(str, several))}; a search has one, so leave the others out"
        with pytest.raises(RunError, match=re.escape(message)):
            studies.tune(study, "desk", tmp_path / "other", **options)


def test_validation_on_the_training_records_that_are_not_used(content, write, tmp_path):
    desk = content["datasets"]["desk"]
    desk["train"]["limit"] = 1
    desk["validation"] = {"data": "train.jsonl", "unused": True}
    study = studies.read_study(write(content))
    studies.tune(study, "desk", tmp_path / "search", method="wide blob", trials=1, data=tmp_path)
    (trial,) = (tmp_path / "search" / "runs").glob("*trial0.json")
    result = studies.read_result(tmp_path / "search", trial.stem)
    labels = {record["label"] for record in queries()}
    assert result.training["num_examples"] == len(labels)
    assert len(result.scores_of("validation", 4)["confidence"]) == 2 * len(queries()) - len(labels)
    for train, other in (({"limit": None}, "train.jsonl"), ({"limit": 1}, "test.jsonl")):
        desk["train"] |= train
        desk["validation"]["data"] = other
        with pytest.raises(RunError, match=r"desk: validation: 'unused' is for the training file, train\.jsonl, and"):
            studies.read_study(write(content)).jobs(tmp_path, tmp_path)


def test_the_pareto_front_by_hand():
    found = [(0.7, 0.10), (0.6, 0.05), (0.7, 0.12), (0.65, 0.11), (0.5, 0.05), (0.4, 0.01)]
    trials = [studies.Trial(i, {}, {"accuracy": a, "ece": e}, True) for i, (a, e) in enumerate(found)]
    assert [trial.number for trial in studies.pareto_front(trials)] == [0, 1, 5]  # in the order that they came
