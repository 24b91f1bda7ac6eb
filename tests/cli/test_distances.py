"""`bloblora evaluate --distances`: fitted once, saved, and the AUROC that scikit-learn computes of it."""

import json
from pathlib import Path

import pytest
import torch
from sklearn.metrics import roc_auc_score

from bloblora import runs
from bloblora.hub.push import stage
from tests.tiny_base import QUESTIONS, queries, several, write_jsonl


@pytest.fixture
def trained(base, tmp_path):
    def build(records, method="lora", **options):
        data = str(write_jsonl(tmp_path / "train.jsonl", records))
        given = {"data": data, "output": str(tmp_path / "run"), "model": str(base), "method": method, "steps": 2}
        config = runs.RunConfig.of(**given, **options)
        runs.train(config, progress=False)
        return config

    return build


def test_they_are_fitted_once_on_what_was_trained_on(trained, call, files, tmp_path):
    config = trained(several(3), limit=5, temperature_scaling=True, validation=0.5)
    arguments = ["evaluate", config.output, "--data", files.texts, "--ood", files.outside, "--distances", "--json"]
    blocked = Path(config.output) / "distance.safetensors"
    blocked.mkdir()  # as in a folder that can't be written
    first, out, err = call(*arguments)
    assert "the distance isn't in the run's folder, which can't be written: " in err
    blocked.rmdir()
    status, again, _ = call(*arguments)
    assert (first, status) == (0, 0), err
    assert again == out
    result, description = json.loads(out), runs.open_run(config.output)
    kept = runs.training_records(description)
    assert len(kept) == description.training["num_examples"] == 5
    distance, run = runs.open_distance(description), runs.load_run(description)
    outside = [json.loads(line) for line in Path(files.outside).read_text(encoding="utf-8").splitlines()]
    sides = [distance.scores(run.hidden_states(side)) for side in (queries(), outside)]
    for name in ("mahalanobis", "relative_mahalanobis"):
        scores = [side[name].tolist() for side in sides]
        expected = roc_auc_score([0] * len(scores[0]) + [1] * len(scores[1]), scores[0] + scores[1])
        assert result[f"auroc_{name}"] == pytest.approx(expected)
    # from then on the training data isn't needed, here or where the run is pushed to
    Path(config.data).unlink()
    assert json.loads(call(*arguments)[1]) == result
    stage(description, tmp_path / "staged")
    staged = runs.open_distance(runs.open_run(tmp_path / "staged"))
    assert torch.equal(staged.whitening, distance.whitening)


@pytest.mark.parametrize(("validation", "count"), [(0.2, 8), ("file", 10)])
def test_records_that_validation_leaves_to_the_training(trained, files, validation, count):
    given = files.texts if validation == "file" else validation
    with pytest.warns(UserWarning, match="records are too few"):
        config = trained(several(3), limit=5, temperature_scaling=True, validation=given)
    description = runs.open_run(config.output)
    kept = runs.training_records(description)
    assert len(kept) == description.training["num_examples"] == count


def test_far_texts_are_flagged_by_their_distance(trained, call, tmp_path):
    config = trained(queries() * 2, "blob", head="class_means")
    held_out = write_jsonl(tmp_path / "held_out.jsonl", several(12))
    options = ("--samples", "2", "--false-alarm", "0.2", "--coverage", "0.5")
    status, out, err = call("calibrate", config.output, "--data", held_out, *options, "--json")
    assert status == 0, err
    scope = json.loads(out)["decision"]["scope"]
    assert scope["score"] == "mahalanobis"
    lines = call("predict", config.output, "--input", held_out, "--samples", "2")[1].splitlines()
    for line in map(json.loads, lines):
        assert line["out_of_scope"] == (line["mahalanobis"] > scope["threshold"])
    (Path(config.output) / "distance.json").unlink()
    status, _, err = call("predict", config.output, "--input", held_out, "--samples", "2")
    assert status != 0
    assert "score mahalanobis: these predictions have no such distance" in err


def test_questions_are_one_class(trained, call, files, tmp_path):
    config = trained(QUESTIONS * 2, "blob")
    far = write_jsonl(tmp_path / "far.jsonl", [{"question": "Where?", "choices": ["here", "there"]}])
    options = ("--ood", far, "--distances", "--approximate", "linearized")
    status, out, err = call("evaluate", config.output, "--data", files.questions, *options, "--json")
    assert status == 0, err
    assert "auroc_mahalanobis" in (result := json.loads(out))
    assert "auroc_relative_mahalanobis" not in result


def test_what_is_wrong_is_said_before_the_model_loads(trained, call, files, monkeypatch):
    config = trained(queries())
    arguments = ("evaluate", config.output, "--data", files.texts, "--distances")
    monkeypatch.setattr(runs, "load_run", lambda *_, **__: pytest.fail("the model was loaded"))
    assert (
        "no distance from its training records is known; `bloblora evaluate`"
        in call(*("calibrate", config.output, "--data", files.texts, "--score", "mahalanobis"))[2]
    )
    write_jsonl(Path(config.data), queries()[:3])
    status, _, err = call(*arguments, "--ood", files.outside)
    assert status != 0
    assert "train.jsonl: changed since the run was trained on it; distances need the training records" in err


def test_a_damaged_file(trained, call, files):
    config = trained(queries())
    arguments = ("evaluate", config.output, "--data", files.texts, "--ood", files.outside, "--distances")
    assert call(*arguments)[0] == 0
    file = Path(config.output) / "distance.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert "distance.safetensors: its SHA-256 isn't the one in distance.json" in call(*arguments)[2]
