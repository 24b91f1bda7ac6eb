"""Would another posterior over the head be better than the diagonal Gaussian that was trained?

    python benchmarks/head_posterior.py --runs DIR
    python benchmarks/head_posterior.py --runs DIR --seeds 0 1 2

A Gaussian head is trained on the support desk, as in benchmarks/studies/methods.yaml: adapters in the last ten blocks.
What its head reads of each text then stays as it is, and the head alone is known in four ways: the Gaussian that was
trained, its mean, the maximum a posteriori (by L-BFGS), and the whole posterior, by Hamiltonian Monte Carlo (Neal,
arXiv 1206.1901): two chains from the maximum, in coordinates in which the curvature there, averaged over the classes,
is one. The last two are for Gaussian priors of several widths; shown is the width with the lowest NLL of the validation
records. Each has a temperature from those, which divides the logits of the average. A quarter of an hour a seed on one
core; a run in DIR is taken as it is.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import keep, parser_of
from torch import Tensor
from torch.nn.functional import cross_entropy

from bloblora import find_posterior, models, runs
from bloblora.data import read_records
from bloblora.evaluation import example_scores, markdown_table, ood_metrics, paired_bootstrap
from bloblora.prediction import fit_temperature
from bloblora.studies.job import machine

PARTS = ("train", "validation", "test", "out_of_scope")
WIDTHS = (0.06, 0.08, 0.12, 0.2)
"""Standard deviations of the prior; √(2/d) is 0.059 here."""
DRAWS = 4000  # of so many classes under so wide a posterior the average of 400 is still .04 nats worse
BURN_IN, KEPT = 100, DRAWS // 2
"""Of each chain: trajectories before the first draw, and draws."""
LEAPS = 12  # steps of a trajectory at most
REFERENCE = "the Gaussian, N = 0"


@dataclass(frozen=True)
class Texts:
    """What a head read of texts (n, d), and their classes (n,), of which texts that no class fits have none."""

    read: Tensor
    labels: Tensor


@torch.no_grad()
def texts_of(run: runs.Run, records: Sequence[dict[str, Any]]) -> Texts:
    """What the head of a run reads of the last token of each text."""
    head = find_posterior(run.model).head
    read: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0][0, -1].float()))
    for record in records:
        run.model(**run.tokenizer(record["text"], return_tensors="pt"))
    hook.remove()
    labels = [run.task.labels.index(record["label"]) for record in records if record["label"] in run.task.labels]
    return Texts(torch.stack(read), torch.tensor(labels))


def maximum(known: Texts, width: float, classes: int) -> Tensor:
    """The weights (C, d) with the highest posterior density under a prior N(0, width²)."""
    weights = torch.zeros(classes, known.read.shape[1], dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([weights], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-6)
    read = known.read.double()

    def closure() -> Tensor:
        search.zero_grad()
        energy = cross_entropy(read @ weights.T, known.labels, reduction="sum") + weights.square().sum() / 2 / width**2
        energy.backward()
        return energy

    search.step(closure)
    return weights.detach().float()


def chain(known: Texts, width: float, start: Tensor, seed: int) -> list[Tensor]:
    """Draws of the weights from their posterior; before the first the step is adapted to accept four of five."""
    generator = torch.Generator().manual_seed(seed)
    p = (known.read @ start.T).softmax(-1)
    curvature = (known.read.T * (p * (1 - p)).mean(-1)) @ known.read + torch.eye(known.read.shape[1]) / width**2
    root = torch.linalg.cholesky(torch.linalg.inv(curvature.double())).float()
    read, rows = known.read @ root, torch.arange(len(known.labels))

    def energy_and_slope(place: Tensor) -> tuple[Tensor, Tensor]:
        log_p, weights = (read @ place.T).log_softmax(-1), place @ root.T
        residual = log_p.exp()
        residual[rows, known.labels] -= 1
        energy = -log_p[rows, known.labels].sum() + weights.square().sum() / 2 / width**2
        return energy, residual.T @ read + weights / width**2 @ root

    place = torch.linalg.solve_triangular(root, start.T, upper=False).T
    energy, slope = energy_and_slope(place)
    step, draws = 0.25, []
    for number in range(BURN_IN + KEPT):
        momentum = torch.randn(place.shape, generator=generator)
        before = energy + momentum.square().sum() / 2
        there, energy_there, slope_there = place, energy, slope
        for _ in range(int(torch.randint(1, LEAPS + 1, (), generator=generator))):
            momentum = momentum - step / 2 * slope_there
            there = there + step * momentum
            energy_there, slope_there = energy_and_slope(there)
            momentum = momentum - step / 2 * slope_there
        accepted = (before - energy_there - momentum.square().sum() / 2).clamp(max=0).exp().item()
        if torch.rand((), generator=generator).item() < accepted:
            place, energy, slope = there, energy_there, slope_there
        if number < BURN_IN:
            step *= math.exp((accepted - 0.8) / 20)
        else:
            draws.append(place @ root.T)
    return draws


def averaged(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (n, C) of the average over draws (S, n, C), and the mutual information (n,)."""
    log_p = logits.log_softmax(-1)
    mean = log_p.logsumexp(0) - math.log(len(log_p))
    return mean, entropy(mean) - entropy(log_p).mean(0)


def entropy(log_p: Tensor) -> Tensor:
    """Of log-probabilities (…, C), (…)."""
    return torch.special.entr(log_p.exp()).sum(-1)


def scored(parts: Mapping[str, Texts], logits: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Of draws' logits (S, n, C) of what the head read: what the table shows, and the scores of each test record."""
    log_p, disagreement = zip(*(averaged(logits(parts[name].read)) for name in PARTS[1:]), strict=True)
    temperature = fit_temperature([log_p[0][None]], [parts["validation"].labels])
    chosen, tested, outside = ((rows / temperature).log_softmax(-1) for rows in log_p)
    labels = parts["test"].labels
    scores = (
        {"entropy": entropy(rows), "mi": mi} for rows, mi in zip((tested, outside), disagreement[1:], strict=True)
    )
    told = ood_metrics(*scores)
    found = {
        "accuracy": (tested.argmax(-1) == labels).double().mean().item(),
        "nll, T = 1": cross_entropy(log_p[1], labels).item(),
        "temperature": temperature,
        "nll": cross_entropy(tested, labels).item(),
        "validation nll": cross_entropy(chosen, parts["validation"].labels).item(),
        "AUROC of the entropy": told["auroc_entropy"],
    }
    if (disagreement[1] > 1e-6).any():
        found["AUROC of the mutual information"] = told["auroc_mi"]
    return found | {"scores": example_scores(tested.double(), labels)}


def measure(run: runs.Run) -> dict[str, dict[str, Any]]:
    """All ways to know the head of one run."""
    parts = {name: texts_of(run, read_records(f"support_desk:{name}", require_labels=False)) for name in PARTS}
    known, head = parts["train"], find_posterior(run.model).head
    weights, bias = head.weight.detach().float(), 0 if head.bias is None else head.bias.detach().float()
    noise = torch.randn(DRAWS, 1, len(weights), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def of_gaussian(read: Tensor) -> Tensor:
        return read @ weights.T + bias + head.variance(read).sqrt() * noise

    found = {
        REFERENCE: scored(parts, lambda read: (read @ weights.T + bias)[None]),
        f"the Gaussian, {DRAWS} draws": scored(parts, of_gaussian),
    }
    for width in WIDTHS:
        best = maximum(known, width, len(weights))
        draws = torch.stack([draw for seed in (0, 1) for draw in chain(known, width, best, seed)])
        found[f"maximum, σ = {width}"] = scored(parts, lambda read, best=best: (read @ best.T)[None])
        found[f"posterior, σ = {width}"] = scored(parts, lambda read, draws=draws: read @ draws.mT)
        for half in (0, 1):  # each chain alone shows how well they agree
            alone = draws[half * KEPT : (half + 1) * KEPT]
            nll = scored(parts, lambda read, alone=alone: read @ alone.mT)["nll"]
            found[f"posterior, σ = {width}"][f"nll, chain {half}"] = nll
        print(width, {name: round(found[name]["nll"], 3) for name in [*found][-2:]}, flush=True)
    return found


def chosen(found: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each kind the width with the lowest validation NLL; and how the test NLL differs from the Gaussian's mean."""
    best: dict[str, str] = {}
    for name in sorted(found, key=lambda name: found[name]["validation nll"]):
        best.setdefault(name.partition(", σ")[0], name)
    rows = {}
    for name in [name for name in found if name in best.values()]:
        rows[name] = {key: value for key, value in found[name].items() if key not in ("scores", "validation nll")}
        if name != REFERENCE:
            rows[name]["Δ nll"] = paired_bootstrap([found[name]["scores"]], [found[REFERENCE]["scores"]], "nll")
    return rows


def main() -> None:
    """Train, measure, write, print."""
    parser = parser_of(__doc__, "head_posterior")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs that are trained")
    parser.add_argument("--model", default=models.DEFAULT_MODEL)
    parser.add_argument("--top-blocks", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    results, text = {}, ""
    for seed in options.seeds:
        found = measure(trained(seed, options))
        results[f"seed {seed}"] = {
            name: {k: v for k, v in values.items() if k != "scores"} for name, values in found.items()
        }
        rows = chosen(found)
        columns = [*dict.fromkeys(key for values in rows.values() for key in values)]
        table = markdown_table(rows, columns)
        text += f"\n## Seed {seed}\n\n{table}"
        print(table)
    about = "Made by `python benchmarks/head_posterior.py`, whose docstring says how. Machine, versions: results.json."
    keep(options.results, {"results": results, "machine": machine()}, f"# Posteriors of a head\n\n{about}\n{text}")


def trained(seed: int, options: argparse.Namespace) -> runs.Run:
    """A Gaussian head on the support desk."""
    return runs.train(
        runs.RunConfig.of(
            data="support_desk:train",
            validation="support_desk:validation",
            output=str(options.runs / f"seed{seed}"),
            model=options.model,
            dtype=options.dtype,
            head="trained",
            top_blocks=options.top_blocks,
            steps=options.steps,
            batch_size=16,
            learning_rate=2e-3,
            seed=seed,
        )
    )


if __name__ == "__main__":
    main()
