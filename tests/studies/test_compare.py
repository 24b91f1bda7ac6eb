"""A study is run by two workers, skips what is done, survives a run's failure, and its report opens by itself."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser

import psutil
import pytest
import submitit
import torch
from sklearn.metrics import roc_auc_score

from bloblora import evaluation, runs, studies
from bloblora.data import read_records
from bloblora.models import ModelError
from bloblora.runs import RunError, alone
from bloblora.studies.compare import _error, _lifeline
from bloblora.studies.job import write_result
from bloblora.training import last_checkpoint
from tests.studies.conftest import make_content, write_study
from tests.tiny_base import queries, write_jsonl


def compare(study, folder, **options):
    return studies.compare(study, folder / "results", runs=folder / "runs", data=folder, **options)


here = partial(compare, engine="debug")
"""In this process, by submitit's engine for that: a process of its own takes seconds to import what it needs."""


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """A study that two workers have run, of which a run has failed, the report then, and what a second call did."""
    folder = tmp_path_factory.mktemp("done")
    study = studies.read_study(write_study(folder, make_content(base, folder)))
    blocked = folder / "runs" / "desk--lora--seed0"
    blocked.parent.mkdir()
    blocked.write_text("a file where the run's folder should be")
    first = compare(replace(study, seeds=(0,)), folder, workers=2)
    text = studies.report(folder / "results").with_name("report.md").read_text()
    blocked.unlink()
    return study, folder, first, text, here(study, folder)


@pytest.fixture(scope="module")
def done(finished):
    """A study that is done, and its folder."""
    return finished[:2]


def test_a_study_from_file_to_page(done):
    study, root = done
    folder = root / "results"
    job = next(job for job in study.jobs(root / "runs", root) if job.label == "wide blob")
    result = studies.read_result(folder, job.name)
    # what is stored is what the trained run says of the same records
    run, records = runs.load_run(job.config.output), read_records(str(root / "test.jsonl"))
    for n in (0, 2, 4):
        prediction = run.predict(records, n, seed=job.config.seed)
        expected = evaluation.summary(prediction, runs.targets_of(run.task, records))
        found = result.metrics["test"][str(n)]
        assert found["nll"] == pytest.approx(expected["nll"], rel=1e-5)
        assert found["num_draws"] == max(n, 1)
        torch.testing.assert_close(result.scores[f"test/{n}/confidence"], prediction.confidence)
    assert result.scores["out_of_scope/4/mutual_information"].shape == (2,)
    assert "accuracy" not in result.metrics["out_of_scope"]["4"]
    # nothing is left to do, and nothing is done again
    before = {file.name: file.stat().st_mtime_ns for file in (folder / "runs").glob("*--*.json")}
    assert compare(study, root) == []
    assert {file.name: file.stat().st_mtime_ns for file in (folder / "runs").glob("*--*.json")} == before

    page = studies.report(folder).read_text()
    parsed = Page()
    parsed.feed(page)
    assert parsed.outside == []
    assert parsed.tags.count("svg") == 6  # reliability, risk-coverage, ECE and NLL against N, learning, Pareto
    assert "bloblora report" in page
    text = (folder / "report.md").read_text()
    assert re.search(r"^\| wide blob, N = 4 \|", text, re.MULTILINE)
    assert len(re.findall(r"^\| lora \|", text, re.MULTILINE)) == 4  # one row a table: its draws are all the same
    assert "shift to other" in text
    assert "Δ CE² | Δ NLL" in text
    header, _, *rows = re.search(r"^\|  \| accuracy.*?\n\n", text, re.MULTILINE | re.DOTALL)[0].strip().splitlines()
    columns = [cell.strip() for cell in header.split("|")]
    cells = [dict(zip(columns, map(str.strip, row.split("|")), strict=True)) for row in rows]
    nlls = [float(row["NLL ↓"].strip("*").split()[0]) for row in cells]
    assert len(rows) == 4
    assert nlls == sorted(nlls)
    assert all("*" not in row["ECE ↓"] and row["ECE floor"] != "–" for row in cells)
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert len(pictures) == 3  # the page alone has reliability, risk-coverage and learning
    assert all((folder / picture).is_file() for picture in pictures)
    assert text.startswith("# tiny\n\n**desk**: “")  # the study's name, then the conclusion
    assert "<strong>desk</strong>: “" in page
    assert text.index("Difference from lora") < text.index("shift to other") < text.rindex("Difference from lora")
    with pytest.raises(RunError, match="baseline 'map' is not one of the methods lora, wide blob"):
        studies.report(folder, baseline="map")


@pytest.mark.filterwarnings("ignore:validation:UserWarning")
def test_methods_that_are_stopped_in_time_have_a_table_and_a_figure(content, write, tmp_path):
    """Only those that have validation data, which stand beside the study as all data do."""
    content |= {"seeds": [0], "samples": [0], "methods": {"lora": {}, "in time": {"method": "lora"}}}
    content["methods"]["in time"] |= {"validation": "validation.jsonl", "eval_steps": 1}
    study = studies.read_study(write(content))
    assert [outcome.error for outcome in here(study, tmp_path)] == [None, None]
    page = studies.report(tmp_path / "results").read_text()
    text = (tmp_path / "results" / "report.md").read_text()
    table = text.partition("The checkpoint with the lowest validation NLL, which was kept.")[2].partition("\n\n|")[2]
    assert re.search(r"^\| in time \| (1|2)(\.\d+)? \|", table, re.MULTILINE)
    assert "validation NLL against step" in page
    config = studies.read_result(tmp_path / "results", "desk--in_time--seed0").config
    assert config["validation"] == "validation.jsonl"
    write_jsonl(tmp_path / "validation.jsonl", queries()[1:])
    with pytest.raises(RunError, match=r"in_time--seed0 .*configuration \(sha256 of validation: "):
        here(study, tmp_path)


def test_models_and_budgets_are_compared_each_by_itself(content, base, write, tmp_path):
    shutil.copytree(base, tmp_path / "other")
    content |= {"models": [str(base), str(tmp_path / "other")], "seeds": [0], "samples": [0], "budgets": [1, 2]}
    content["datasets"] = {"the desk/ü": content["datasets"]["desk"]}
    content["datasets"]["the desk/ü"].pop("shifted")
    del content["methods"]["wide blob"]
    outcomes = here(studies.read_study(write(content)), tmp_path)
    assert [outcome.error for outcome in outcomes] == [None] * 4
    results = list(studies.read_results(tmp_path / "results"))
    assert {(result.config["model"], result.training["final"]["step"]) for result in results} == {
        (model, steps) for model in content["models"] for steps in (1, 2)
    }
    text = studies.report(tmp_path / "results").with_suffix(".md").read_text()
    other = content["models"][1]
    headings = re.findall(r"^## (the desk/ü.*)$", text, re.MULTILINE)
    assert sorted(headings) == sorted(f"the desk/ü{m}{s}" for m in ("", f", {other}") for s in ("", ", 2 steps"))
    for model in content["models"]:
        assert all(f"With `model: {model}`, `max_steps: {steps}`." in text for steps in (1, 2))
    assert text.count("Test data, 1 seed.") == 4
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert len(set(pictures)) == len(pictures)
    assert all((tmp_path / "results" / picture).is_file() for picture in pictures)


def test_an_ensemble_has_as_many_draws_as_members(content, write, tmp_path):
    content |= {"seeds": [0], "samples": [0, 2, 10], "methods": {"lora": {}, "ensemble": {"members": 2}}}
    here(studies.read_study(write(content)), tmp_path)
    text = studies.report(tmp_path / "results").with_suffix(".md").read_text()
    assert set(re.findall(r"^\| (ensemble.*?) \|", text, re.MULTILINE)) == {
        "ensemble, N = 0",
        "ensemble, N = 2",
        "ensemble",
    }


class Page(HTMLParser):
    """Tags of a page, and what it would fetch."""

    def __init__(self):
        super().__init__()
        self.tags, self.outside = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.outside += [
            value for name, value in attributes if name in ("src", "href", "xlink:href") and not value.startswith("#")
        ]


def test_a_new_number_of_draws_needs_no_training(done):
    study, folder = done
    weights = {file: file.stat().st_mtime_ns for file in folder.glob("runs/*/adapter_model.safetensors")}
    outcomes = here(replace(study, samples=(0, 6), seeds=(1,)), folder)
    assert [outcome.error for outcome in outcomes] == [None] * 2
    result = studies.read_result(folder / "results", "desk--wide_blob--seed1")
    assert set(result.metrics["test"]) == {"0", "2", "4", "6"}
    assert {file: file.stat().st_mtime_ns for file in folder.glob("runs/*/adapter_model.safetensors")} == weights


def test_a_result_of_another_configuration_is_not_overwritten(done):
    study, folder = done
    with pytest.raises(RunError, match=r"another .*\(max_steps: 2 there, 3 now\), .*; rename the method, or"):
        compare(replace(study, train={**study.train, "steps": 3}), folder)


def test_a_result_on_another_test_set_is_not_taken_for_this_one(done):
    study, folder = done
    desk = study.datasets["desk"]
    changed = replace(study, datasets={"desk": replace(desk, test=replace(desk.test, limit=1))})
    with pytest.raises(
        RunError, match=r"test: limit: None there, 1 now; test: sha256: '\w*' .*; rename the data set, or"
    ):
        compare(changed, folder)


@pytest.mark.parametrize("name", ["train", "test", "outside", "validation"])
def test_a_result_on_other_records_is_not_taken_for_this_one(done, name, tmp_path):
    study, root = done
    shutil.copytree(root / "results", tmp_path / "results")
    for file in root.glob("*.jsonl"):
        shutil.copy(file, tmp_path)
    there = tmp_path / "results", root / "runs", tmp_path
    assert studies.plan(study, *there)[1] == []
    first, second, *others = (tmp_path / f"{name}.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / f"{name}.jsonl").write_text("".join([second, first, *others]))
    if name == "validation":  # which `tune` alone reads
        assert studies.plan(study, *there)[1] == []
        return
    what = {"train": "sha256 of training", "test": "test: sha256", "outside": "out_of_scope: sha256"}[name]
    with pytest.raises(RunError, match=rf"lora--seed0 .*configuration \({what}: '\w*' there, '\w*' now"):
        studies.plan(study, *there)


def test_a_result_without_labels_is_not_taken_for_one_with_them(done):
    study, folder = done
    desk = study.datasets["desk"]
    unlabelled = replace(desk, shifted={"other": replace(desk.shifted["other"], labelled=False)})
    with pytest.raises(RunError, match=r"configuration \(other: labelled: True there, False now"):
        compare(replace(study, datasets={"desk": unlabelled}), folder)


def test_two_at_once_do_not_write_into_each_others_runs_or_results(done):
    study, folder = done
    for place in (folder / "runs", folder / "results" / "runs"):
        with alone(place, inside=True), pytest.raises(RunError, match="runs: another process is at work in it"):
            compare(study, folder)
    for place in (folder / "results" / "report.md", folder / "page.html"):
        with alone(place), pytest.raises(RunError, match=f"{place.name}: another process is at work in it"):
            studies.report(folder / "results", folder / "page.html")
    assert compare(study, folder) == []


def test_killed_it_leaves_nobody_at_work_and_goes_on_to_the_same(content, write, tmp_path):
    content |= {"seeds": [0], "samples": [0, 2], "methods": {"lora": {}}}
    content["train"] |= {"steps": 60, "save_steps": 20}
    study, name = studies.read_study(write(content)), "desk--lora--seed0"
    run, results = tmp_path / "runs" / name, tmp_path / "results"

    def found():
        result = studies.read_result(results, name)
        weights = (run / "adapter_model.safetensors").read_bytes()
        return [result.metrics, result.training["final"]["nll"], weights], result.training["resumed_from"]

    process = multiprocessing.get_context("fork").Process(target=compare, args=(study, tmp_path))
    process.start()
    while not last_checkpoint(run / "checkpoints"):
        assert process.is_alive()
        time.sleep(0.005)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.join()
    assert len(children) == 2  # submitit's own, and the one that trains
    assert psutil.wait_procs(children, timeout=20)[1] == []
    with alone(run.parent, inside=True), alone(run, inside=True):
        assert studies.read_result(results, name) is None
    here(study, tmp_path)
    killed, resumed = found()
    assert resumed in ("checkpoint-20", "checkpoint-40")
    for folder in (run, results):
        shutil.rmtree(folder)
    here(study, tmp_path)
    assert found() == (killed, None)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_it_starts_sees_its_end(number):
    context = multiprocessing.get_context("fork")
    started = context.Queue()

    def hold():
        with _lifeline() as as_parent, as_parent():
            started.put(subprocess.Popen(["cat"]).pid)  # which reads its input to the end
            time.sleep(100)

    process = context.Process(target=hold)
    process.start()
    child = psutil.Process(started.get(timeout=20))
    with pytest.raises(psutil.TimeoutExpired):
        child.wait(0.2)
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == -number
    child.wait(20)


def test_a_job_without_a_result_says_what_it_said_last(tmp_path):
    job = submitit.AutoExecutor(tmp_path, cluster="local").submit(os._exit, 3)
    job._results_timeout_s = 0  # it waits for a result that may come late
    assert re.match("it ended without a result, and the last that it said is: .* Loading pickle", error := _error(job))
    assert error.endswith("_0_log.err)")


def test_a_run_that_fails_does_not_stop_the_others_and_is_tried_again(finished):
    _, _, first, text, second = finished
    outcomes = {outcome.job.label: outcome.error for outcome in first}
    assert "is a file; give a folder" in outcomes["lora"]
    assert "log: " in outcomes["lora"]
    assert outcomes["wide blob"] is None
    assert re.search(r"2 runs that the study has, 1 lack results:\n\n- `desk--lora--seed0` failed: .* is a file", text)
    done = [(outcome.job.name, outcome.error) for outcome in second]
    assert sorted(done) == [(f"desk--{name}", None) for name in ("lora--seed0", "lora--seed1", "wide_blob--seed1")]


def test_a_wrong_data_file_stops_before_anything_runs(content, write, tmp_path):
    content["datasets"]["desk"]["out_of_scope"] = "none.jsonl"
    with pytest.raises(ValueError, match=r"none\.jsonl"):
        compare(studies.read_study(write(content)), tmp_path)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("record", "file", "message"),
    [
        ({"text": "a song", "label": "music"}, "test", r"test: '.*test.jsonl': field 'label': 'music' not among the"),
        ({"text": "a song", "label": "music"}, "shifted", r"other: '.*jsonl': field 'label': 'music' not among the"),
        (
            {"question": "which?", "choices": ["a", "b"], "answer": 1},
            "test",
            "test: '.*test.jsonl': must have records with 'text', as the training data, not 'question' and 'choices'",
        ),
        ({"question": "which?", "choices": ["a", "b"]}, "outside", "out_of_scope: '.*jsonl': must have records with"),
    ],
)
def test_a_set_that_is_not_of_the_task_stops_before_anything_runs(record, file, message, content, write, tmp_path):
    write_jsonl(tmp_path / f"{file}.jsonl", [record])
    with pytest.raises(RunError, match=f"datasets: desk: {message}"):
        compare(studies.read_study(write(content)), tmp_path)
    assert not (tmp_path / "runs").exists()


def test_a_model_that_is_not_there_stops_before_anything_runs(content, write, tmp_path):
    content["models"] = [str(tmp_path / "none")]
    with pytest.raises(ModelError, match="none': no such folder"):
        compare(studies.read_study(write(content)), tmp_path)
    assert not (tmp_path / "runs").exists()


def test_a_damaged_result_is_named(done, tmp_path):
    shutil.copytree(done[1] / "results", tmp_path / "results")
    file = tmp_path / "results" / "runs" / "desk--lora--seed0.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(RunError, match=r"desk--lora--seed0\.json: its \.safetensors can't be read"):
        studies.report(tmp_path / "results")


def test_metrics_alone_give_the_tables_and_no_intervals(done, tmp_path):
    whole, alone_there = done[1] / "results", tmp_path / "results"
    studies.report(whole)
    alone_there.mkdir()
    shutil.copy(whole / "metrics.json", alone_there)
    texts = [studies.report(folder).with_suffix(".md").read_text() for folder in (whole, alone_there)]
    assert (alone_there / "metrics.json").read_text() == (whole / "metrics.json").read_text()
    rows = [re.findall(r"^\| (?:lora|wide).*", text, re.MULTILINE) for text in texts]
    assert set(rows[1]) < set(rows[0])
    assert not re.search(r"\[[-+]\d", "".join(rows[1]))  # no interval
    assert "Of some runs only metrics.json is there" in texts[1]
    assert "Of some runs" not in texts[0]
    # what every run's file says is there, to five digits; its scores are missing, so the run is not done
    of_run, of_all = (studies.read_result(folder, "desk--wide_blob--seed0") for folder in (whole, alone_there))
    assert of_all.metrics["test"]["4"] == pytest.approx(of_run.metrics["test"]["4"], rel=1e-4)
    assert (of_all.config, of_all.machine, of_all.sets) == (of_run.config, of_run.machine, of_run.sets)
    study, root = done
    assert len(studies.plan(study, alone_there, root / "runs", root)[1]) == 4
    with pytest.raises(RunError, match=r"max_steps: 2 there, 3 now\), written by bloblora \d"):
        studies.plan(replace(study, train={**study.train, "steps": 3}), alone_there, root / "runs", root)


def test_each_number_of_draws_has_the_uncertainty_that_predict_has(content, write, tmp_path):
    """A Gaussian head's part of it is a mean over the draws, of which a smaller N has fewer."""
    content |= {"seeds": [0], "methods": {"lora": {}, "head": {"method": "blob", "factors": "A", "init_std": 0.3}}}
    content["methods"]["head"]["head"] = "trained"
    study = studies.read_study(write(content))
    job = study.jobs(tmp_path / "runs", tmp_path)[1]
    result = studies.job.run(job, tmp_path / "results", progress=False)
    run, records = runs.load_run(job.config.output), read_records(str(tmp_path / "test.jsonl"))
    for n in (0, 2, 4):
        prediction = run.predict(records, n, seed=0)
        assert (prediction.head_shares is None) == (n == 0)
        torch.testing.assert_close(result.scores[f"test/{n}/mutual_information"], prediction.mutual_information)


def test_out_of_scope_metrics_are_those_of_the_scores(done):
    result = studies.read_result(done[1] / "results", "desk--wide_blob--seed0")
    inside, outside = (result.scores_of(key, 4)["confidence"].numpy() for key in ("test", "out_of_scope"))
    labels = [0] * len(inside) + [1] * len(outside)
    expected = roc_auc_score(labels, [*-inside, *-outside])
    assert result.metrics["out_of_scope"]["4"]["auroc_confidence"] == pytest.approx(expected)
    assert "auroc_mutual_information" not in result.metrics["out_of_scope"]["0"]  # the posterior mean alone


def test_results_of_other_versions(done, tmp_path):
    """An option that a result lacks is its default; a key that is not known says which version wrote it."""
    study, root = done
    shutil.copytree(root / "results", tmp_path / "results")
    file = tmp_path / "results" / "runs" / "desk--lora--seed0.json"
    content = json.loads(file.read_text())
    content["config"]["keep_checkpoints"] = False
    content["config"]["lora"]["lora_dropout"] = 0.0
    del content["seconds"], content["sha256"], content["sets"]["test"]["sha256"], content["sets"]["test"]["labelled"]
    file.write_text(json.dumps(content))
    assert studies.plan(study, tmp_path / "results", root / "runs", root)[1] == []
    content["novelty"] = 1
    content["machine"]["bloblora"] = "9.8.7"
    file.write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"seed0\.json: unknown key 'novelty': it was written by bloblora 9\.8\.7"):
        studies.report(tmp_path / "results")


def test_models_are_deleted_where_the_study_says_so(content, write, tmp_path):
    content |= {"keep_runs": False, "seeds": [0], "samples": [0]}
    here(studies.read_study(write(content)), tmp_path)
    assert {folder.name for folder in (tmp_path / "runs").iterdir()} == {"logs"}
    assert json.loads((tmp_path / "results" / "runs" / "desk--lora--seed0.json").read_text())["metrics"]["test"]["0"]


def test_distances_are_added_where_the_study_says_so(content, write, tmp_path):
    content |= {"seeds": [0], "samples": [0, 2]}
    here(studies.read_study(write(content)), tmp_path)
    study = studies.read_study(write(content | {"distances": True}))
    outcomes = here(study, tmp_path)
    assert [(outcome.job.label, outcome.error) for outcome in outcomes] == [("lora", None)]  # class means have them
    assert compare(study, tmp_path) == []
    for job in study.jobs(tmp_path / "runs", tmp_path):
        result = studies.read_result(tmp_path / "results", job.name)
        distance = runs.open_distance(runs.open_run(job.config.output))
        outside = [{"text": "a song"}, {"text": "the weather"}]
        expected = distance.scores(runs.load_run(job.config.output).hidden_states(outside))["mahalanobis"]
        scores = [result.scores[f"{key}/2/mahalanobis"] for key in ("test", "out_of_scope")]
        torch.testing.assert_close(scores[1], expected.float(), rtol=1e-4, atol=1e-4)
        auroc = roc_auc_score([0] * len(scores[0]) + [1] * len(scores[1]), torch.cat(scores))
        assert result.metrics["out_of_scope"]["2"]["auroc_mahalanobis"] == pytest.approx(auroc)
    report = studies.report(tmp_path / "results").with_suffix(".md").read_text()
    assert "| AUROC dist. ↑ | FPR95 dist. ↓ | AUROC relative dist. ↑ |" in report


def test_an_empty_folder_has_no_report(tmp_path):
    with pytest.raises(RunError, match="no results in it"):
        studies.report(tmp_path)


def test_prompts_are_refused_before_anything_is_trained(content, write, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": "Say yes.", "response": "yes"}] * 2)
    with pytest.raises(
        RunError, match=r"train\.jsonl: a study compares labels, choices and values; task 'generation' has none"
    ):
        compare(studies.read_study(write(content)), tmp_path)
    assert not (tmp_path / "runs").exists()


def test_a_report_of_a_run_that_was_stopped_between_its_sets(done, tmp_path):
    shutil.copytree(done[1] / "results", tmp_path / "results")
    (result,) = [r for r in studies.read_results(tmp_path / "results") if r.name == "desk--lora--seed1"]
    for name in [name for name in result.scores if name.startswith("other/")]:
        del result.scores[name]
    del result.metrics["other"]
    write_result(result, tmp_path / "results")
    assert "shift to" in studies.report(tmp_path / "results").with_suffix(".md").read_text()


def test_values_are_compared_and_searched(base, tmp_path):
    """No confidence, ECE or accuracy: their figures and columns aren't there, and `ece` is no aim."""
    words = ("card", "refund", "payment")
    data = [{"text": " ".join(words[: i % 3 + 1]), "value": i % 3 + i / 100} for i in range(24)]
    for name in ("train", "test", "validation", "outside"):
        write_jsonl(tmp_path / f"{name}.jsonl", data)
    content = {
        "name": "values",
        "models": [str(base)],
        "seeds": [0],
        "samples": [0, 2, 3],
        "train": {"steps": 2, "batch_size": 4, "r": 2, "validation": 0},
        "datasets": {
            "stars": {
                "train": {"data": "train.jsonl"},
                "test": "test.jsonl",
                "out_of_scope": "outside.jsonl",
                "validation": "validation.jsonl",
            }
        },
        "methods": {"lora": {}, "blob": {}},
    }
    study = studies.read_study(write_study(tmp_path, content))
    assert [outcome.error for outcome in here(study, tmp_path)] == [None, None]
    studies.report(tmp_path / "results")
    text = (tmp_path / "results" / "report.md").read_text()
    assert "| RMSE ↓ |" in text
    assert "AUROC epistemic sd" in text
    assert "ECE" not in text.partition("## Setting")[2].partition("## stars")[2]
    job = next(job for job in study.jobs(tmp_path / "runs", tmp_path) if job.label == "blob")
    run, result = runs.load_run(job.config.output), studies.read_result(tmp_path / "results", job.name)
    for n in (0, 2, 3):
        expected = run.predict(data, n, seed=job.config.seed)
        torch.testing.assert_close(result.scores[f"test/{n}/std"], expected.std.float())
    assert compare(study, tmp_path) == []
    found = studies.tune(study, "stars", tmp_path / "search", trials=1, data=tmp_path)
    assert "rmse" in found[0].metrics
    assert studies.pareto_front(found) == []
    with pytest.raises(RunError, match="those of task 'regression' aren't"):
        studies.tune(study, "stars", tmp_path / "search", aim="ece", data=tmp_path)


def test_a_method_that_has_no_form_for_the_task_stops_a_study_early(base, tmp_path):
    write_jsonl(tmp_path / "data.jsonl", [{"text": "card", "value": i / 7} for i in range(9)])
    datasets = {"stars": {"train": {"data": "data.jsonl"}, "test": "data.jsonl"}}
    content = {"name": "values", "models": [str(base)], "datasets": datasets, "methods": {"lora": {}, "tfb": {}}}
    with pytest.raises(RunError, match="method 'tfb' has no form for task 'regression'"):
        here(studies.read_study(write_study(tmp_path, content)), tmp_path)
    assert not (tmp_path / "runs").exists()
