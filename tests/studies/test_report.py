"""What a report concludes from numbers whose answer is known."""

import re
import shutil
from dataclasses import asdict, replace

import pytest
import torch

from bloblora.files import write_json
from bloblora.runs import RunError
from bloblora.studies import DataSet, EvalSet, Study, report
from bloblora.studies.job import Result, write_result
from bloblora.studies.report import Row, _chosen, _differences, _rows, conclusion

NOISE = torch.linspace(-1, 1, 200)[torch.randperm(200, generator=torch.Generator().manual_seed(0))]


def result(label, nll, seed=0):
    """Of 200 examples; ``nll`` is each one's, or their mean alone where scores are missing."""
    scores = {"test/0/nll": nll} if isinstance(nll, torch.Tensor) else {}
    metrics = {"test": {"0": {"nll": float(torch.as_tensor(nll).mean()), "num_draws": 1}}}
    return Result(
        f"desk--{label}--seed{seed}", "desk", label, {"seed": seed}, {}, {}, {}, metrics=metrics, scores=scores
    )


def row(label, nll, seeds=1):
    return Row(label, label, 0, [result(label, nll, seed) for seed in range(seeds)])


LORA, BETTER, WORSE, ALIKE = (
    row("lora", 1 + NOISE),
    row("better", 0.5 + NOISE),
    row("worse", 1.5 + NOISE),
    row("alike", 0.99 + NOISE.flip(0)),  # a difference of 0.01 whose standard error is about 0.06
)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [LORA, ALIKE],
            "“alike” has the lowest NLL on test data, 0.990, against 1.000 of “lora”. Against “lora”, no method has a "
            "lower NLL by more than its 95 % interval, of 1 compared. Each",
        ),
        (
            [LORA, BETTER, WORSE, ALIKE],
            "“better” has the lowest NLL on test data, 0.500, against 1.000 of “lora”. Against “lora”, the 95 % "
            "interval of the difference is below 0 for “better”; it is above 0 for “worse”. Each",
        ),
        ([LORA, WORSE], "“lora” has the lowest NLL on test data, 1.000. Against “lora”, no method has a lower NLL by"),
        ([row("lora", 1.0), BETTER], "of “lora”. Without scores per example of both, nothing says whether"),
        ([BETTER, WORSE], "“better” has the lowest NLL on test data, 0.500; there is no result of “lora” to compare"),
        ([LORA], "“lora” has the lowest NLL on test data, 1.000. Without scores per example of both"),
    ],
)
def test_it_claims_no_more_than_the_intervals_do(rows, said):
    text = conclusion("desk", rows, "lora")
    assert text.startswith("**desk**: ")
    assert said in text
    assert text.count(". ") <= 2  # one to three sentences


def test_it_says_of_how_many_seeds():
    assert conclusion("desk", [row("lora", 1 + NOISE, 3), row("better", NOISE, 3)], "lora").endswith("(3 seeds).")


def test_methods_are_compared_on_the_seeds_that_both_have():
    """Seed 2 is hard: the mean of all of lora's seeds is above those of both others, which seed by seed are no better.

    So it is whatever the order of the results.
    """
    lora = Row("lora", "lora", 0, [result("lora", by + NOISE, seed) for seed, by in ((2, 4), (0, 1), (1, 1.2))])
    worse = Row("worse", "worse", 0, [result("worse", by + NOISE, seed) for seed, by in ((1, 1.7), (0, 1.5))])
    apart = Row("apart", "apart", 0, [result("apart", 0.1 + NOISE, 7)])
    text = conclusion("desk", [lora, worse, apart], "lora")
    assert (
        "“lora” has the lowest NLL on test data, 2.067; “lora” has no seed on the same records in common with “apart”. "
        in text
    )
    assert "it is above 0 for “worse”" in text
    assert text.endswith(
        "(4 seeds, but seeds 0 and 1 and 2 of “lora”, but seeds 0 and 1 of “worse”, but seed 7 of “apart”)."
    )
    (table,) = _differences([lora, worse, apart], "lora", "test")
    assert "mean over the seeds that both have (2 seeds, but none of “apart”)." in table
    assert re.findall(r"^\| (.*?) \| (.*?) ", table, re.MULTILINE)[2:] == [("worse", "+0.500")]
    better = Row("better", "better", 0, [result("better", by + NOISE, seed) for seed, by in ((2, 3.5), (1, 0.7))])
    said = "“better” has the lowest NLL on test data, 2.100, against 2.600 of “lora” with the same seeds 1 and 2."
    assert said in conclusion("desk", [lora, better], "lora")


def test_what_was_measured_on_other_records_is_named_and_not_compared():
    lora, better = row("lora", 1 + NOISE), row("better", 0.5 + NOISE)
    fewer, renamed = row("fewer", 0.1 + NOISE[:50]), row("renamed", 0.2 + NOISE)
    for of, examples, limit in ((lora, 200, None), (better, 200, None), (fewer, 50, None), (renamed, 200, 10)):
        of.results[0].metrics["test"]["0"]["num_examples"] = examples
        of.results[0].sets["test"] = {"data": "test.jsonl", "limit": limit}
    rows = [lora, better, fewer, renamed]
    text = conclusion("desk", rows, "lora")
    assert "“better” has the lowest NLL on test data, 0.500, against 1.000 of “lora”" in text
    assert "“lora” has no seed on the same records in common with “fewer”, “renamed”." in text
    *notes, table = _differences(rows, "lora", "test")
    assert notes[0].startswith(
        "\ndesk: “fewer” of seed 0 was measured on other records of test than “lora” (number diff"
    )
    assert notes[1].startswith(
        "\ndesk: “renamed” of seed 0 was measured on other records of test than “lora” (limit diff"
    )
    assert len(notes) == 2
    assert re.findall(r"^\| (.*?) \|", table, re.MULTILINE)[2:] == ["better"]


def test_seeds_on_other_records_are_in_no_interval_together():
    """Of seed 1 both methods saw fewer records, and of seed 2 as many others."""
    rows = [
        Row(label, label, 0, [result(label, by + NOISE, seed) for seed in (0, 1, 2)])
        for label, by in (("lora", 1), ("better", 0.5))
    ]
    for row in rows:
        row.results[1] = result(row.label, NOISE[:50], 1)
        for of, digest in zip(row.results, "abc", strict=True):
            of.metrics["test"]["0"]["num_examples"] = 50 if digest == "b" else 200
            of.sets["test"] = {"sha256": digest}
    assert "the 95 % interval of the difference is below 0 for “better”" in conclusion("desk", rows, "lora")
    *notes, table = _differences(rows, "lora", "test")
    assert [note.partition(", and no interval")[0] for note in notes] == [
        "\ndesk: seed 1 of “lora” was measured on other records of test than seed 0 (sha256, number differ)",
        "\ndesk: seed 2 of “lora” was measured on other records of test than seed 0 (sha256 differ)",
    ]
    assert "mean over the seeds that both have (1 seed)." in table


def test_trials_of_a_search_are_no_results_of_a_study(tmp_path):
    trial = result("lora", 1.0)
    write_result(replace(trial, metrics={"validation": trial.metrics["test"]}), tmp_path)
    with pytest.raises(RunError, match="no results in it of test data; give a folder that `bloblora compare` wrote"):
        report(tmp_path)


def drawn(label, *seeds):
    """Results whose numbers of draws by N are given, a dict a seed."""
    of = [{str(n): {"nll": 1.0 + n / 10, "num_draws": count} for n, count in draws.items()} for draws in seeds]
    config = {"method": {"name": label}}
    return [
        Result("job", "desk", label, {**config, "seed": i}, {}, {}, {}, metrics={"test": found})
        for i, found in enumerate(of)
    ]


def test_a_row_has_all_seeds_of_a_method_and_one_number_of_draws():
    found = [
        *drawn("lora", {0: 1, 1: 1}, {0: 1, 1: 1}),
        *drawn("blob", {0: 1, 1: 1}, {0: 1, 1: 1}),
        *drawn("tfb", {0: 1, 1: 1, 4: 1}, {0: 1, 1: 1, 4: 4}),  # the first seed chose the width 0
        *drawn("swag", {0: 1, 4: 1}, {0: 1, 4: 1}),
        *drawn("of a package that is not here", {0: 1, 1: 1}),
    ]
    assert [(row.label, row.num_samples, len(row.results)) for row in _rows(found)] == [
        ("lora", 0, 2),
        ("blob, N = 0", 0, 2),
        ("blob, N = 1", 1, 2),
        ("tfb, N = 0", 0, 2),
        ("tfb, N = 1", 1, 2),
        ("tfb, N = 4", 4, 2),
        ("swag", 0, 2),
        ("of a package that is not here, N = 0", 0, 1),
        ("of a package that is not here, N = 1", 1, 1),
    ]


def test_runs_without_a_result_are_listed(tmp_path):
    study = Study("desk", {"lora": {}, "blob": {}}, {"desk": DataSet({}, EvalSet("test.jsonl"))}, seeds=(0, 1))
    errors = {"desk--blob--seed0": "RunError: it diverged", "desk--gone--seed0": "not of this study"}
    write_json(tmp_path / "runs" / "study.json", asdict(study) | {"file": None, "errors": errors})
    machine = {"cpu": "a", "threads": 1, "torch": "1", "transformers": "1", "peft": "1"}
    training = {"seconds": 1, "peak_memory_bytes": 1}
    for seed in (0, 1):
        found = replace(result("lora", 1 + NOISE, seed), machine=machine, training=training, seconds={"test": 1.0})
        write_result(replace(found, config={"seed": seed, "method": {"name": "lora"}}), tmp_path)
    for where in ("", "once its runs' own files are gone"):
        if where:
            shutil.rmtree(tmp_path / "runs")
        text = report(tmp_path).with_name("report.md").read_text()
        assert (
            "Of 4 runs that the study has, 2 lack results:\n\n- `desk--blob--seed0` failed: RunError: it diverged\n"
            "- Not run: `desk--blob--seed1`\n" in text
        )


def validated(label, nlls, steps, **options):
    """Of so many evaluated steps; a test NLL a seed."""
    training = {"validation": {"trainings": [{"curve": [{"step": step} for step in steps]}]}}
    config = {"method": {"name": label.partition(",")[0]}, "training": {"eval_steps": steps[0], **options}}
    found = [
        Result("job", "desk", label, {**config, "seed": seed}, {}, training, {}, metrics=result(label, nll).metrics)
        for seed, nll in enumerate(nlls)
    ]
    return Row(label, label, 0, found)


def test_it_counts_how_often_the_steps_were_chosen_wrong():
    chosen, fixed = validated("lora", [1.0, 0.9, 1.3], [10, 20]), validated("lora, all steps", [1.2, 1.2, 1.2], [20])
    other = validated("lora, faster", [1.0, 1.0, 1.0], [20], learning_rate=0.1)  # another training: no pair
    (table,) = _chosen([chosen, fixed, other])
    rows = [
        [cell.strip(" *|") for cell in line.split(" | ")] for line in table.splitlines() if line.startswith("| lora")
    ]
    assert [[name, *(cell.split(" ± ")[0] for cell in cells)] for name, *cells in rows] == [
        ["lora", "1.200", "1.067", "-0.133", "0.333"]
    ]
    assert not [*_chosen([chosen, other])]
    unsorted = Row(fixed.label, fixed.method, 0, fixed.results[:0:-1])  # seeds 2 and 1
    (table,) = _chosen([chosen, unsorted])
    assert "| lora | 1.200 ± 0.000 | 1.100 ± 0.283 | -0.100 ± 0.283 |" in table
