"""Predictions in a file that a stop leaves usable."""

import json

import pytest

from bloblora import runs
from bloblora.runs.processes import CHUNK, append_lines
from tests.tiny_base import QUESTIONS, queries, write_jsonl

DATA = {
    "texts": (queries(), [{"text": "what is the weather"}]),
    "questions": (QUESTIONS, [{"question": "Which metal?", "choices": ["gold", "a card"]}]),
}
THREE, FOUR = (runs.PredictionOptions(samples=n) for n in (3, 4))
ROWS = list(range(2 * CHUNK + 10))


def describe(seen, stop=None):
    """Lines of a chunk; ``seen`` collects the rows; a row ``stop`` is as a kill is."""

    def lines(rows):
        if stop in rows:
            raise KeyboardInterrupt
        seen.extend(rows)
        return ({"row": row} for row in rows)

    return lines


@pytest.mark.parametrize("torn", ["", '{"row": 256}\n{"ro'])
def test_what_is_written_is_not_predicted_again(tmp_path, torn):
    file, seen = tmp_path / "lines.jsonl", []
    with pytest.raises(KeyboardInterrupt):
        append_lines(file, ROWS, describe(seen, stop=CHUNK + 3), {"seed": 0})
    assert seen == ROWS[:CHUNK]
    with file.open("a") as handle:
        handle.write(torn)
    for _ in range(2):  # the second time nothing is left to do
        append_lines(file, ROWS, describe(seen), {"seed": 0})
        assert seen == ROWS
        assert [json.loads(line)["row"] for line in file.read_text().splitlines()] == ROWS


def test_lines_of_something_else_stay(tmp_path):
    file = tmp_path / "lines.jsonl"
    append_lines(file, ROWS, describe([]), {"seed": 0, "num_samples": 3})
    before = file.read_bytes()
    with pytest.raises(runs.RunError, match=r"lines\.jsonl holds other predictions \(seed 0 there, 1 now\); give"):
        append_lines(file, ROWS, describe([]), {"seed": 1, "num_samples": 3})
    (tmp_path / "lines.jsonl.meta.json").unlink()
    with pytest.raises(runs.RunError, match=r"is there, without the lines\.jsonl\.meta\.json"):
        append_lines(file, ROWS, describe([]), {"seed": 0, "num_samples": 3})
    assert file.read_bytes() == before


@pytest.mark.parametrize("data", DATA)
def test_an_evaluation_from_its_file_is_that_of_the_draws(base, tmp_path, data, one_thread):
    """Also of records with fewer choices than others, and of those out of scope."""
    records, outside = DATA[data]
    file = write_jsonl(tmp_path / "data.jsonl", records)
    config = runs.RunConfig.of(data=str(file), output=str(tmp_path / "run"), model=str(base), steps=2, batch_size=2)
    run = runs.train(config.with_options(learning_rate=0.01, init_std=0.25, r=2), progress=False)
    expected = runs.evaluate(run, records, outside, THREE)
    predictions = tmp_path / "predictions.jsonl"
    run = runs.load_run(config.output)
    assert runs.evaluate(run, records, outside, THREE, predictions=predictions) == pytest.approx(expected, abs=1e-5)
    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    described = [*runs.describe(run, [*records, *outside], THREE)]
    assert [{key: line[key] for key in of} for line, of in zip(lines, described, strict=True)] == described
    for line, count in zip(lines, [len(line["probabilities"]) for line in described], strict=True):
        assert (len(line["log_probabilities"]), line["num_draws"]) == (count, 3)

    def fail(*_, **__):
        raise AssertionError("it predicts again")

    run.predict = fail
    assert runs.evaluate(run, records, outside, THREE, predictions=predictions) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(runs.RunError, match=r"\(num_samples 3 there, 4 now\)"):
        runs.evaluate(run, records, outside, FOUR, predictions=predictions)
    with pytest.raises(runs.RunError, match=r"\(records_sha256 \w+ there, \w+ now\)"):
        runs.evaluate(run, records[:1], outside, THREE, predictions=predictions)
