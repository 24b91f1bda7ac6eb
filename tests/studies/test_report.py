"""What a report concludes from numbers whose answer is known."""

import pytest
import torch

from bloblora.studies.job import Result
from bloblora.studies.report import Row, _chosen, conclusion

NOISE = torch.linspace(-1, 1, 200)[torch.randperm(200, generator=torch.Generator().manual_seed(0))]


def row(label, nll, seeds=1):
    """Of 200 examples; ``nll`` is each one's, or their mean alone where scores are missing."""
    scores = {"test/0/nll": nll} if isinstance(nll, torch.Tensor) else {}
    metrics = {"test": {"0": {"nll": float(torch.as_tensor(nll).mean()), "num_draws": 1}}}
    results = [Result("job", "desk", label, {}, {}, {}, {}, metrics=metrics, scores=scores) for _ in range(seeds)]
    return Row(label, label, 0, results)


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


def validated(label, nlls, steps, **options):
    """Of so many evaluated steps; a test NLL a seed."""
    training = {"validation": {"trainings": [{"curve": [{"step": step} for step in steps]}]}}
    config = {"method": {"name": label.partition(",")[0]}, "training": {"eval_steps": steps[0], **options}}
    metrics = [{"test": {"0": {"nll": nll, "num_draws": 1}}} for nll in nlls]
    return Row(label, label, 0, [Result("job", "desk", label, config, {}, training, {}, metrics=m) for m in metrics])


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
