"""The ways that a first hour goes: names that are shorter, files that people have, what to type next."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bloblora import runs, tasks
from bloblora.cli import following
from bloblora.runs import RunConfig
from bloblora.runs.processes import on_cpu, use_device, visible_device
from tests.cli.conftest import SETTINGS
from tests.cli.test_commands import lines
from tests.cli.test_errors import NOWHERE, fails
from tests.tiny_base import queries, write_jsonl


def fresh(*arguments, **options):
    """The command in a process of its own, as people start it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    command = [sys.executable, "-m", "bloblora", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, **options)


def test_help_is_kept_for_the_next_time(tmp_path):
    program = "import sys; from bloblora.cli import main\ntry: main(['train', '--help'])\nfinally: "
    program += "print(*({'torch', 'jsonargparse'} & {*sys.modules}), file=sys.stderr)"
    environment = os.environ | {"BLOBLORA_CACHE": str(tmp_path)}
    first, second = (
        subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    )
    assert {*first.stderr.split()} == {"torch", "jsonargparse"}
    assert second.stderr.split() == []
    assert first.stdout == second.stdout
    assert "--prior-std" in second.stdout


def test_what_predicts_needs_no_trainer_and_no_data_frames():
    needless = {"transformers.trainer", "datasets", "pandas", "scipy.stats", "matplotlib"}
    program = f"import bloblora.cli.predict, bloblora.cli.options, sys; print(sorted({needless} & {{*sys.modules}}))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"


def test_targets_by_their_names_or_all(call, files, tmp_path):
    for given, expected in (("q_proj,v_proj", {"q_proj", "v_proj"}), ("o_proj", {"o_proj"}), ("all-linear", None)):
        folder = tmp_path / given
        arguments = ("train", "--data", files.texts, "--model", files.base, "--output", folder, *SETTINGS)
        status, _, err = call(*arguments, "--targets", given)
        assert status == 0, err
        names = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
        adapted = {name.rpartition(".")[2] for name in names}
        if expected is None:
            assert adapted >= {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        else:
            assert adapted == expected


def test_a_pattern_of_peft_stays_one():
    config = RunConfig.of(data="a", output="b", targets=r".*\.(q|v)_proj")
    assert config.lora["target_modules"] == r".*\.(q|v)_proj"


def test_epochs_a_device_and_a_model_beside(call, files, tmp_path, monkeypatch):
    shutil.copytree(files.base, tmp_path / "here" / "base")
    arguments = ("--data", files.texts, "--model", "base", "--output", "run", "--epochs", "3", "--batch-size", "2")
    done = fresh("train", *arguments, "--r", "2", "--device", "cpu", "--json", cwd=tmp_path / "here")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["final"]["step"] == 6  # 4 records in batches of 2
    stored = json.loads((tmp_path / "here" / "run" / "run.json").read_text())
    assert stored["config"]["model"] == str(tmp_path / "here" / "base")
    # found from anywhere
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")  # so that what the command sets is undone
    monkeypatch.chdir("/")
    status, out, err = call("predict", tmp_path / "here" / "run", "--input", files.texts, "--device", "cpu")
    assert status == 0, err
    assert len(out.splitlines()) == 4


@pytest.mark.parametrize("command", [("train", "--output", "x", "--data"), ("predict", NOWHERE, "--input")])
def test_devices_that_are_none_or_not_here(call, files, command):
    fails(call(*command, files.texts, "--device", "gpu"), "device must be cpu, cuda, cuda:N or mps, got 'gpu'")
    fails(
        call(*command, files.texts, "--device", "cuda:99"), "device 'cuda:99': PyTorch sees no such device here, only"
    )


def test_a_device_is_the_whole_process(monkeypatch):
    assert [visible_device("1", visible) for visible in ("4,7", "GPU-a,GPU-b", "")] == ["7", "GPU-b", "1"]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    use_device("cpu")
    assert on_cpu()


def test_a_table_is_one(call, run, choice_run, files, tmp_path):
    for folder, records, columns in (
        (run, files.texts, ["probability_parcel", "probability_refund"]),
        (choice_run, files.questions, ["probability_0", "probability_1", "probability_2"]),
    ):
        table = tmp_path / f"{Path(folder).name}.csv"
        assert call("predict", folder, "--input", records, "--samples", "2", "--output", table)[:2] == (0, "")
        answers = lines(call("predict", folder, "--input", records, "--samples", "2")[1])
        with table.open(encoding="utf-8", newline="") as handle:
            rows = list(csv.DictReader(handle))
        assert [name for name in rows[0] if name.startswith("probability_")] == columns
        for row, line in zip(rows, answers, strict=True):
            assert (row["label"], float(row["confidence"])) == (line["label"], pytest.approx(line["confidence"]))
            numbers = [float(row[name]) for name in columns if row[name] != ""]
            assert numbers == pytest.approx([*line["probabilities"].values()])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["questions.csv", "texts.csv"]


def test_metrics_of_each_data_set_are_kept(call, run, files, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("metrics.json")))
    other = write_jsonl(tmp_path / "other.jsonl", queries()[:3])
    for data, samples in ((files.texts, "3"), (other, "3"), (files.texts, "0"), (files.texts, "3")):
        elsewhere = tmp_path / "elsewhere.json"
        evaluate = ("evaluate", folder, "--data", data, "--samples", samples, "--output", elsewhere)
        assert call(*evaluate, *(["--diagram", tmp_path / "far.png"] if samples == "0" else []))[0] == 0
    entries = json.loads((folder / "metrics.json").read_text())["evaluations"]
    found = [(entry["data"], entry["num_samples"], entry["metrics"]["num_examples"]) for entry in entries]
    assert found == [(str(other), 3, 3), (files.texts, 0, 4), (files.texts, 3, 4)]  # the latest last
    assert entries[-1]["metrics"] == json.loads(elsewhere.read_text())
    assert call("card", folder)[0] == 0
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in card for name in ("other.jsonl, n = 3, N = 3", "texts.jsonl, n = 4, N = 0"))
    assert "](reliability-texts.png)" in card
    status, _, err = call("evaluate", folder, "--data", files.texts, "--output", folder / "metrics.json")
    assert status == 2
    assert "metrics are written there anyway" in err
    # of another adapter they aren't this one's
    entries[0]["adapter_sha256"] = "f00"
    (folder / "metrics.json").write_text(json.dumps({"evaluations": entries}))
    assert call("card", folder)[0] == 0
    assert "other.jsonl" not in (folder / "README.md").read_text(encoding="utf-8")


def test_metrics_of_another_form_are_found_before_the_model_is_loaded(call, run, files, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    (folder / "metrics.json").write_text('{"accuracy": 0.5}')
    monkeypatch.setattr(runs, "load_run", lambda *_, **__: pytest.fail("the model was loaded"))
    fails(call("evaluate", folder, "--data", files.texts), "metrics.json: not what `bloblora evaluate` writes")


def test_a_folder_that_cannot_be_written_costs_no_evaluation(call, run, files, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    (folder / ".metrics.json.lock").mkdir()  # root may write into any folder
    status, out, err = call("evaluate", folder, "--data", files.texts, "--samples", "2", "--json")
    assert (status, json.loads(out)["num_examples"]) == (0, 4)
    assert "metrics aren't in the run's folder" in err


DESK = "--data support_desk:test --ood support_desk:out_of_scope"


@pytest.mark.parametrize(
    ("data", "kind", "expected"),
    [
        (
            "support_desk",
            tasks.Classification,
            "evaluate runs/a --data support_desk:test --ood support_desk:out_of_scope",
        ),
        ("arc_easy", tasks.ChoiceText, "evaluate runs/a --data arc_easy:validation"),
        ("prompts.jsonl", tasks.TextGeneration, "generate runs/a --input FILE"),
        ("queries.jsonl", tasks.Classification, "evaluate runs/a --data FILE"),
        ("{folder}/train.jsonl", tasks.Classification, "evaluate runs/a --data {folder}/test.jsonl"),
    ],
)
def test_the_next_step_fits_the_task(data, kind, expected, tmp_path):
    (tmp_path / "test.jsonl").write_text("")
    data, expected = data.format(folder=tmp_path), expected.format(folder=tmp_path)
    config = RunConfig.of(data=data, output="runs/a")
    options = {"labels": ("a", "b")} if kind is tasks.Classification else {}
    assert following.after_training(config, kind(pad_token_id=0, **options)) == f"bloblora {expected}"


def test_a_program_that_the_shell_does_not_find(tmp_path, monkeypatch):
    script = tmp_path / "a venv" / "bloblora"
    script.parent.mkdir()
    script.write_text("")
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert following.program() == f"'{script}'"
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    assert following.program() == "bloblora"


def test_after_the_demo_each_command_is_one_that_parses(call, run, tmp_path, monkeypatch):
    """With the tiny run in the place of the demo's: its labels are others, so what is asked is the command line."""
    text = following.after_demo(Path(run))
    commands = [line.partition("bloblora ")[2].split("  ")[0] for line in text.splitlines() if "bloblora " in line]
    assert [command.split()[0] for command in commands] == ["predict", "calibrate", "evaluate", "serve", "train"]
    for command in commands:
        for option in (part for part in command.split() if part.startswith("--")):
            assert f"{option} " in call(command.split()[0], "--help")[1].replace(",", " ")
    assert text.count(str(run)) == 4


def test_a_mistyped_model_of_the_hub_fails_in_seconds(files, tmp_path):
    environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    program = "import time, bloblora.models as m\nstart = time.monotonic()\ntry: m.load_tokenizer('nobody/nothing')\n"
    program += "except m.ModelError as error: print(time.monotonic() - start, error)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    seconds, _, message = done.stdout.partition(" ")
    assert float(seconds) < 15
    assert message.count("\n") == 1
    assert "model 'nobody/nothing' can't be loaded: http://127.0.0.1:9 can't be reached, and no copy" in message
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("place", "option", "message"),
    [
        ("train", "model", "train: 'model' is for a single run; give `models`"),
        ("methods", "seed", "methods: lora: 'seed' is for a single run; give `seeds`"),
        ("datasets", "output", "datasets: desk: train: 'output' is for a single run"),
    ],
)
def test_a_study_refuses_what_it_would_not_do(call, files, tmp_path, place, option, message):
    content = {
        "train": {},
        "methods": {"lora": {}},
        "datasets": {"desk": {"train": {"data": files.texts}, "test": files.texts}},
    }
    options = {"train": content["train"], "methods": content["methods"]["lora"]}.get(place)
    (content["datasets"]["desk"]["train"] if options is None else options)[option] = "gpt2"
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    status, _, err = call("compare", tmp_path / "study.yaml", "--output", tmp_path / "results", "--dry-run")
    assert status == 2
    assert message in err
