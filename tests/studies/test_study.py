import pytest

from bloblora.runs import RunError
from bloblora.studies import read_study


def test_jobs_are_seed_by_seed_and_a_methods_options_win(content, write, tmp_path):
    content["train"]["steps"] = 3
    content["methods"]["lora"] = {"steps": 7}
    jobs = read_study(write(content)).jobs(tmp_path / "runs", tmp_path)
    assert [job.name for job in jobs] == [
        "desk--lora--seed0",
        "desk--wide_blob--seed0",
        "desk--lora--seed1",
        "desk--wide_blob--seed1",
    ]
    assert [job.config.value("max_steps") for job in jobs] == [7, 3, 7, 3]
    assert [job.config.method["name"] for job in jobs] == ["lora", "blob"] * 2
    assert jobs[1].config.method["prior_std"] == 0.5
    assert jobs[0].config.data == str(tmp_path / "train.jsonl")
    assert jobs[0].config.value("learning_rate") == 0.01
    assert set(jobs[0].sets) == {"test", "other", "out_of_scope"}
    assert not jobs[0].sets["out_of_scope"].labelled


def test_a_model_or_a_budget_that_is_added_renames_no_run(content, write, tmp_path):
    content["train"]["steps"] = 3
    before = read_study(write(content)).jobs(tmp_path / "runs", tmp_path)
    for added in ({"models": [*content["models"], "other"]}, {"budgets": [3, 5]}):
        study = read_study(write(content | added))
        jobs = {job.name: job for job in study.jobs(tmp_path / "runs", tmp_path)}
        assert len(jobs) == 2 * len(before)
        assert [*jobs] == study.names()
        assert all(jobs[job.name].config.given() == job.config.given() for job in before)
        assert all(jobs[job.name].dataset == job.dataset for job in before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("methods"), "field 'methods' is missing"),
        (lambda c: c.update(sedes=[1]), "the file: unknown field 'sedes'; did you mean 'seeds'"),
        (lambda c: c.update(seeds=["a"]), r"seeds: \['a'\]; it must be a list of int"),
        (lambda c: c.update(seeds=[1, 1]), r"seeds: \[1, 1\]; each must be there once"),
        (lambda c: c.update(samples=[-1]), "samples: -1 is negative"),
        (lambda c: c.update(baseline="map"), "baseline 'map' is not one of the methods lora, wide blob"),
        (lambda c: c["train"].update(step=1), "methods: lora on desk: unknown option 'step'; did you mean 'steps'"),
        (lambda c: c["methods"].update(x={"prior": 1}), None),
        (lambda c: c["datasets"]["desk"].pop("test"), "datasets: desk: field 'test' is missing"),
        (
            lambda c: c["datasets"]["desk"]["train"].pop("data"),
            "desk: train: field 'data': None; it must name",
        ),
        (lambda c: c["datasets"]["desk"].update(test={"limit": 3}), "desk: test: field 'data': None"),
        (lambda c: c["datasets"]["desk"].update(shifted=["x"]), r"desk: shifted: \['x'\]; it must be a mapping"),
        (lambda c: c["methods"].update(x={"method": "lora", "members": 2}), None),
        (
            lambda c: c["methods"].update({"wide_blob": {"method": "blob"}}),
            "two runs would be called desk--wide_blob--",
        ),
        (lambda c: c["datasets"]["desk"].update(shifted={"test": "a"}), "shifted: 'test' is the name of another set"),
        (
            lambda c: (
                c["datasets"]["desk"].update(
                    train={"data": "train.jsonl", "limit": 2}, test={"data": "train.jsonl", "unused": True}
                ),
                c["methods"].update(x={"method": "lora", "limit_seed": 1}),
            ),
            "methods: x: 'limit_seed' leaves other records unused than those of the other methods, and test of desk",
        ),
        (lambda c: c.update(name=["a"]), r"name: \['a'\]; it must be a text"),
        *(
            (
                lambda c, limit=limit: c["datasets"]["desk"].update(test={"data": "test.jsonl", "limit": limit}),
                f"datasets: desk: test: field 'limit': {limit!r}; it must be a number of records, at least 1",
            )
            for limit in ("a", 1.5, 0, -2, True)
        ),
        (
            lambda c: c["datasets"]["desk"]["shifted"]["other"].update(labelled="no"),
            "datasets: desk: shifted: other: field 'labelled': 'no'; it must be true or false",
        ),
        (
            lambda c: c["datasets"]["desk"].update(test={"data": "test.jsonl", "labelled": False}),
            "datasets: desk: test: field 'labelled': false; methods are measured by its labels",
        ),
        (lambda c: c.update(batch_size=0), "batch_size: 0; it must be a number of inputs, at least 1"),
        (lambda c: c.update(distances="no"), "distances: 'no'; it must be true or false"),
        (lambda c: c.update(keep_runs="no"), "keep_runs: 'no'; it must be true or false"),
        (lambda c: c.update(budgets=["a"]), r"budgets: \['a'\]; it must be a list of int"),
    ],
)
def test_what_is_wrong_is_named(change, message, content, write, tmp_path):
    change(content)
    with pytest.raises(RunError, match=message or "methods: x on desk: "):
        read_study(write(content)).jobs(tmp_path, tmp_path)


def test_a_data_folder_that_is_not_there_is_not_the_present_one(content, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="data: 'elsewhere' is not a folder"):
        read_study(write(content)).jobs(tmp_path, "elsewhere")


def test_a_file_that_is_no_yaml(tmp_path):
    (tmp_path / "study.yaml").write_text("a: [")
    with pytest.raises(RunError, match=r"study\.yaml: not readable as YAML"):
        read_study(tmp_path / "study.yaml")
    with pytest.raises(RunError, match="not readable"):
        read_study(tmp_path / "none.yaml")
