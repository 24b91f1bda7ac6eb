"""Decisions of a run, from calibration to what `predict` and `evaluate` say of them."""

import json
import shutil
from pathlib import Path

import pytest

from bloblora import runs
from bloblora.data import support_desk
from bloblora.runs import decide
from tests import tiny_base
from tests.cli.test_commands import lines
from tests.cli.test_errors import NOWHERE, fails
from tests.tiny_base import queries, write_jsonl, write_signed

LAX = ("--risk", "0.9", "--confidence", "0.5", "--coverage", "0.6", "--false-alarm", "0.3", "--samples", "3")
REALIZED = ("answered", "selective_risk", "set_coverage", "set_size", "false_alarm")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("held_out") / "held_out.jsonl", tiny_base.held_out())


@pytest.fixture
def folder(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_calibrate_predict_evaluate(call, folder, held_out, files):
    status, out, _ = call("calibrate", folder, "--data", held_out, "--ood", files.outside, *LAX)
    assert status == 0
    assert "at most 0.9 of the answered are wrong, with probability 0.5, on data like the 60 calibration records" in out
    assert f"saved to {folder / 'decision.json'}" in out
    written = json.loads((folder / "decision.json").read_text())
    (stored,) = written["decisions"]
    run = json.loads((folder / "run.json").read_text())
    assert stored["adapter_sha256"] == run["files"]["adapter_model.safetensors"]
    assert (written["format_version"], stored["num_samples"], stored["seed"]) == (2, 3, 0)
    assert stored["decision"]["scope"]["num_examples"] == 60

    answers = lines(call("predict", folder, "--input", held_out, "--samples", "3")[1])
    rules = stored["decision"]
    for line in answers:
        assert line["decision"] == ("answer" if line["confidence"] > rules["answering"]["threshold"] else "abstain")
        plausible = {name for name, p in line["probabilities"].items() if 1 - p <= rules["label_sets"]["threshold"]}
        assert set(line["label_set"]) == plausible | {line["label"]}
        assert line["label_set"][0] == line["label"]
        assert line["out_of_scope"] == (line["mutual_information"] > rules["scope"]["threshold"])  # a Gaussian head's

    arguments = ("--data", held_out, "--ood", files.outside, "--samples", "3")
    result = json.loads(call("evaluate", folder, *arguments, "--json")[1])
    assert {name: result[name] for name in (*REALIZED, "detection")} == pytest.approx(stored["realized"])
    labels = [json.loads(line)["label"] for line in held_out.read_text().splitlines()]
    right = [label in line["label_set"] for label, line in zip(labels, answers, strict=True)]
    assert result["set_coverage"] == pytest.approx(sum(right) / 60)
    assert "errors among answers" in call("evaluate", folder, *arguments)[1]


def test_choices(call, choice_run, tmp_path):
    """Questions of two and three choices: no set names a choice that a question hasn't."""
    folder = shutil.copytree(choice_run, tmp_path / "run")
    questions = [
        {"question": record["text"], "choices": ["a refund", "a parcel", "a card"][: 2 + i % 2], "answer": i % 2}
        for i, record in enumerate(support_desk("test")[:40])
    ]
    data = write_jsonl(tmp_path / "questions.jsonl", questions)
    answers = lines(call("predict", folder, "--input", data, "--samples", "3")[1])
    for i, (question, line) in enumerate(zip(questions, answers, strict=True)):
        right = question["choices"].index(line["label"])
        question["answer"] = 1 - right if i % 4 == 3 and right < 2 else right
    write_jsonl(data, questions)
    options = ("--label-sets", "aps", "--score", "mutual_information", "--json")
    status, out, err = call("calibrate", folder, "--data", data, *LAX, *options)
    assert status == 0, err
    stored = json.loads(out)
    assert (stored["decision"]["label_sets"]["kind"], stored["decision"]["scope"]["score"]) == ("aps", options[3])
    answers = lines(call("predict", folder, "--input", data, "--samples", "3")[1])
    assert all(line["label_set"] and set(line["label_set"]) <= set(line["probabilities"]) for line in answers)


def test_a_calibration_of_other_predictions_is_refused(call, folder, held_out):
    assert call("calibrate", folder, "--data", held_out, *LAX)[0] == 0
    file = folder / "decision.json"
    stored = json.loads(file.read_text())
    run = json.loads((folder / "run.json").read_text())
    run["config"]["model"] = NOWHERE  # whatever is refused is refused before the model is loaded
    (folder / "run.json").write_text(json.dumps(run))

    def write(**changes):
        write_signed(file, stored | {"decisions": [stored["decisions"][0] | changes]})

    for command in (("predict", folder, "--input", held_out), ("evaluate", folder, "--data", held_out)):
        again = "run `bloblora calibrate` again"
        fails(call(*command), "decision.json", "num_samples 3, seed 0", "num_samples 10, seed 0", again)
        fails(call(*command, "--samples", "3", "--seed", "1"), "seed 1", again)
        write(adapter_sha256="f00")
        fails(call(*command, "--samples", "3"), "adapter_sha256 f00 there", again)
        write(temperature=1.5, width=0.5)  # fitted otherwise then
        now = run["training"]["rescaling"]
        differ = f"temperature 1.5 there, {now['temperature']} now; width 0.5 there, {now['width']} now"
        fails(call(*command, "--samples", "3"), differ, again)
        write_signed(file, stored | {"format_version": 1})
        fails(call(*command, "--samples", "3"), "format_version is 1; this bloblora reads 2")
        write(decision={})
        fails(call(*command, "--samples", "3"), "not what this version of bloblora writes: a decision needs")
        write()
        fails(call(*command, "--samples", "3"), f"model '{NOWHERE}'")
    # Ω by another τ
    posterior = folder / "posterior.safetensors"
    content = bytearray(posterior.read_bytes())
    content[-1] ^= 1
    posterior.write_bytes(content)
    with pytest.raises(ValueError, match=r"posterior\.safetensors: its SHA-256"):
        runs.open_run(folder)


def test_another_n_other_promises_and_predictions_that_are_kept(call, folder, held_out, monkeypatch):
    assert call("calibrate", folder, "--data", held_out, *LAX)[0] == 0
    assert call("calibrate", folder, "--data", held_out, *LAX, "--samples", "0")[0] == 0
    stored = json.loads((folder / "decision.json").read_text())["decisions"]
    assert [entry["num_samples"] for entry in stored] == [3, 0]  # both are there
    for samples in ("3", "0"):
        assert "decision" in lines(call("predict", folder, "--input", held_out, "--samples", samples)[1])[0]
    named = [json.loads(line) | {"id": f"n{i}"} for i, line in enumerate(held_out.read_text().splitlines())]
    same = write_jsonl(folder / "named.jsonl", named)
    assert call("calibrate", folder, "--data", same, *LAX)[0] == 0  # whose kept predictions have other ids
    # the same records once more: no model is needed, whatever is promised now
    loaded = []
    monkeypatch.setattr(decide, "load_run", lambda *_: loaded.append(1))
    status, out, err = call("calibrate", folder, "--data", held_out, *LAX, "--coverage", "0.8")
    assert (status, loaded) == (0, []), err
    assert "at least 0.8 of the label sets" in out
    stored = json.loads((folder / "decision.json").read_text())["decisions"]
    assert [(entry["num_samples"], entry["decision"]["label_sets"]["coverage"]) for entry in stored] == [
        (0, 0.6),
        (3, 0.8),
    ]


def test_rules_that_hold_are_kept_and_the_others_named(call, folder, held_out):
    calibrate = ("calibrate", folder, "--data", held_out, *LAX)
    status, out, err = call(*calibrate, "--risk", "0.05", "--confidence", "0.95")
    assert status == 0, err
    assert "answering: not promised, and left out: risk 0.05 with probability 0.95 needs at least 93 records" in out
    assert "at least 0.6 of the label sets" in out
    (stored,) = json.loads((folder / "decision.json").read_text())["decisions"]
    assert stored["decision"].keys() == {"label_sets", "scope", "refused"}
    line = lines(call("predict", folder, "--input", held_out, "--samples", "3")[1])[0]
    assert "decision" not in line
    assert line["label_set"]
    assert line["out_of_scope"] in (True, False)
    result = json.loads(call("evaluate", folder, "--data", held_out, "--samples", "3", "--json")[1])
    assert "set_coverage" in result
    assert "selective_risk" not in result


def test_predictions_made_elsewhere(call, folder, held_out, tmp_path, monkeypatch):
    answers, decision = tmp_path / "answers.csv", tmp_path / "rules.json"
    assert call("predict", folder, "--input", held_out, "--samples", "3", "--output", answers)[0] == 0
    assert call("calibrate", folder, "--data", held_out, *LAX)[0] == 0
    own = json.loads((folder / "decision.json").read_text())["decisions"][0]["decision"]
    monkeypatch.setattr(decide, "load_run", lambda *_: pytest.fail("the model was loaded"))
    # any model's: no run is needed
    beside = ("--predictions", answers, "--data", held_out, *LAX)
    status, _, err = call("calibrate", *beside, "--output", decision)
    assert status == 0, err
    found = json.loads(decision.read_text())["decisions"][0]["decision"]
    assert found["label_sets"] == pytest.approx(own["label_sets"], abs=1e-6)
    others = [{"query": r["text"], "intent": r["label"]} for r in map(json.loads, held_out.read_text().splitlines())]
    renamed = write_jsonl(tmp_path / "renamed.jsonl", others)
    given = ("--predictions", answers, "--data", renamed, "--text-column", "query", "--label-column", "intent", *LAX)
    assert call("calibrate", *given, "--output", tmp_path / "same.json")[0] == 0
    assert json.loads((tmp_path / "same.json").read_text()) == json.loads(decision.read_text())
    # the run's own: its rules
    assert call("calibrate", folder, *beside)[0] == 0
    (stored,) = json.loads((folder / "decision.json").read_text())["decisions"]
    assert stored["decision"]["scope"].pop("score") == own["scope"].pop("score") == "mutual_information"
    assert stored["decision"]["scope"] == pytest.approx(own["scope"], abs=1e-6)
    assert found["scope"]["score"] == "predictive_entropy"  # nothing says how they were made
    # a file that lacks the default score
    bare = tmp_path / "bare.csv"
    bare.write_text(answers.read_text().replace("mutual_information", "other"))
    assert call("calibrate", folder, "--predictions", bare, "--data", held_out, *LAX)[0] == 0
    (stored,) = json.loads((folder / "decision.json").read_text())["decisions"]
    assert stored["decision"]["scope"]["score"] == "predictive_entropy"
    # what was kept is such a file, and says whose it is
    (kept,) = (folder / "calibration").glob("*.jsonl")
    assert call("calibrate", folder, "--predictions", kept, *LAX)[0] == 0
    fails(
        call("calibrate", folder, "--predictions", kept, *LAX, "--samples", "4"),
        "other predictions than this run's with these options (num_samples 3 there, 4 now)",
    )
    fails(call("calibrate", folder), "calibrate needs --data FILE, or --predictions FILE")
    fails(call("calibrate", "--data", held_out), "calibrate needs the folder of a run, or --predictions FILE")


def test_what_cannot_be_promised_is_not_saved(call, folder, held_out, files):
    calibrate = ("calibrate", folder, "--data", held_out)
    hopeless = ("--risk", "0.01", "--coverage", "0.999", "--false-alarm", "0.001")
    fails(call(*calibrate, *hopeless), "risk 0.01 with", "coverage 0.999 needs", "false_alarm 0.001 needs")
    fails(call(*calibrate, *LAX, "--coverage", "90"), "coverage must be in (0, 1), got 90")
    fails(call(*calibrate, *LAX, "--label-sets", "top"), "expected one of 'lac', 'aps', 'raps'")
    fails(call(*calibrate, *LAX, "--samples", "-1"), "samples must be 0")
    fails(call("calibrate", folder, "--data", files.questions, *LAX), "needs records with 'text'")
    fails(call("calibrate", folder, "--data", files.texts, *LAX), "the run has seen 4 of the 4 records")
    fails(call(*calibrate, *LAX, "--samples", "0", "--score", "mutual_information"), "take predictive_entropy")
    assert not (folder / "decision.json").exists()


def test_data_that_the_run_has_seen_are_refused(call, run, held_out, tmp_path):
    """In any order, and as a part of others."""
    folder, own = shutil.copytree(run, tmp_path / "run"), tmp_path / "own.jsonl"
    for some, known in ((queries()[::-1], 4), (queries()[1:], 3), ([*queries(), *tiny_base.held_out(4)], 4)):
        said = f"the run has seen {known} of the {len(some)} records: it was trained on them"
        write_jsonl(own, [{**record, "id": i} for i, record in enumerate(some)])
        fails(call("calibrate", folder, "--data", own, *LAX), said, "calibrate on records that it has not seen")
        fails(call("calibrate", folder, "--predictions", held_out, "--data", own, *LAX), said)
        with pytest.raises(runs.RunError, match=said):
            decide.calibrate(runs.open_run(folder), some)
        assert said in call("evaluate", folder, "--data", own, "--samples", "3")[2]
    assert "has seen" not in call("evaluate", folder, "--data", held_out, "--samples", "3")[2]
    (Path(folder) / "seen.json").write_text("{}")
    fails(call("calibrate", folder, "--data", own, *LAX), "seen.json: field 'records' is missing")


def test_a_few_records_that_the_run_has_seen_are_left_out(call, files, run, tmp_path):
    """What counts is the content, also where others lie at the place of the training data."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    content = json.loads((folder / "run.json").read_text())
    content["config"]["data"] = own = str(tmp_path / "own.jsonl")
    write_signed(folder / "run.json", content)
    relabelled = queries()[0] | {"label": "parcel"}
    write_jsonl(Path(own), [relabelled, *queries()[2:], *tiny_base.held_out(58)])
    status, _, err = call("calibrate", folder, "--data", own, *LAX)
    assert status == 0
    assert "warning: the run has seen 2 of the 61 records: it was trained on them" in err
    (stored,) = json.loads((folder / "decision.json").read_text())["decisions"]
    assert stored["decision"]["scope"]["num_examples"] == 59
    predicted = tmp_path / "answers.jsonl"
    assert call("predict", folder, "--input", own, "--samples", "3", "--output", predicted)[0] == 0
    assert call("calibrate", folder, "--predictions", predicted, "--data", own, *LAX)[0] == 0
    (again,) = json.loads((folder / "decision.json").read_text())["decisions"]
    assert again["decision"]["label_sets"] == pytest.approx(stored["decision"]["label_sets"], abs=1e-6)


def test_predictions_of_both_sides_in_one_file(call, folder, held_out, files, tmp_path):
    """Rules and what became of them are those of the same records given apart."""
    both, alone = tmp_path / "both.jsonl", tmp_path / "outside.jsonl"
    arguments = (
        "evaluate",
        folder,
        "--data",
        held_out,
        "--ood",
        files.outside,
        "--samples",
        "3",
        "--predictions",
        both,
    )
    assert call(*arguments)[0] == 0
    written = both.read_text()
    marks = [line.get("outside", False) for line in map(json.loads, written.splitlines())]
    assert marks == [False] * 60 + [True] * 3
    assert call(*arguments)[0] == 0  # read again
    assert both.read_text() == written
    assert call("predict", folder, "--input", files.outside, "--samples", "3", "--output", alone)[0] == 0
    own = call("calibrate", folder, "--data", held_out, "--ood", files.outside, *LAX, "--json")
    expected = json.loads(own[1])
    for more in ((), ("--data", held_out), ("--ood", alone), ("--ood", both)):
        status, out, err = call("calibrate", folder, "--predictions", both, *more, *LAX, "--json")
        assert status == 0, err
        use = "left out, because of --ood" if "--ood" in more else "taken as out of scope"
        assert f"both.jsonl: 3 lines of inputs out of scope, marked so by `bloblora evaluate --ood`, are {use}" in err
        assert json.loads(out)["decision"]["scope"] == pytest.approx(expected["decision"]["scope"])
        assert json.loads(out)["realized"] == pytest.approx(expected["realized"])


@pytest.mark.parametrize("kind", ["texts", "questions"])
def test_predictions_of_what_the_run_has_seen_are_refused(call, run, choice_run, files, kind, tmp_path):
    folder = shutil.copytree(run if kind == "texts" else choice_run, tmp_path / "run")
    own, predicted = getattr(files, kind), tmp_path / "predicted.jsonl"
    assert call("evaluate", folder, "--data", own, "--samples", "3", "--predictions", predicted)[0] == 0
    count = len(predicted.read_text().splitlines())
    said = f"the run has seen {count} of the {count} records: it was trained on them"
    fails(call("calibrate", folder, "--predictions", predicted, *LAX), said)
    rows = [json.loads(line) for line in predicted.read_text().splitlines()]
    if kind == "texts":  # a table, and targets by index
        names = [*rows[0]["probabilities"]]
        cells = [[row["text"], row["target"], *map(str, row["probabilities"].values())] for row in rows]
        header = ["text", "target", *(f"probability_{name}" for name in names)]
        (table := tmp_path / "table.csv").write_text("".join(f"{','.join(row)}\n" for row in [header, *cells]))
        fails(call("calibrate", folder, "--predictions", table, *LAX), said)
        indexed = [row | {"target": names.index(row["target"])} for row in rows]
        fails(call("calibrate", folder, "--predictions", write_jsonl(tmp_path / "i.jsonl", indexed), *LAX), said)
    bare = [{name: value for name, value in row.items() if name not in ("text", "question")} for row in rows]
    status, _, err = call("calibrate", folder, "--predictions", write_jsonl(tmp_path / "bare.jsonl", bare * 20), *LAX)
    assert f"warning: {tmp_path / 'bare.jsonl'}: {20 * count} of {20 * count} lines don't say their whole record" in err
    assert status == 0, err


def test_copies_are_counted(call, folder, held_out, tmp_path):
    relabelled = [record | {"label": "refund"} for record in tiny_base.held_out(5)]
    data = write_jsonl(tmp_path / "copies.jsonl", [*tiny_base.held_out(), *relabelled])
    predicted, own = tmp_path / "answers.jsonl", ("--output", tmp_path / "rules.json")
    assert call("predict", folder, "--input", data, "--output", predicted)[0] == 0
    for source in ((folder, "--data", data), ("--predictions", predicted, "--data", data, *own)):
        status, _, err = call("calibrate", *source, *LAX)
        assert (status, "warning: 5 of 65 records are copies: they have the input of another one." in err) == (0, True)
    assert "copies" not in call("calibrate", folder, "--data", held_out, *LAX)[2]


def test_help_says_what_is_promised(call):
    text = call("calibrate", "--help")[1]
    assert all(part in text for part in ("decision.json", "--false-alarm", "Example", "used for nothing else"))
    assert "bloblora calibrate" in call("--help")[1]
    assert all(name in call("predict", "--help")[1] for name in ("`abstain`", "`label_set`", "`out_of_scope`"))
    assert "selective risk" in call("evaluate", "--help")[1]


def test_a_run_without_a_calibration_says_nothing_of_decisions(call, run):
    data = Path(run).parent / "queries.jsonl"
    write_jsonl(data, queries())
    assert "decision" not in lines(call("predict", run, "--input", data, "--samples", "1")[1])[0]


@pytest.mark.parametrize(
    ("options", "named"),
    [(("--by", "p_true", "--matcher", "numeric"), "--matcher, --by"), (("--max-new-tokens", "5"), "--max-new-tokens")],
)
def test_options_for_texts_are_refused_where_nothing_is_written(call, folder, held_out, options, named):
    fails(
        call("calibrate", str(folder), "--data", str(held_out), *options), f"{named}: only for a run that writes text"
    )
