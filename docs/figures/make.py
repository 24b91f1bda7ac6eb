"""The figures of docs/concepts.md: `python docs/figures/make.py`, in seconds, without a language model or a data set.

The first two show a complete BLoB with one matrix A of two entries, which is trained here. The others need the scores
of each example of a study, which are not committed: `bloblora compare benchmarks/studies/support_desk.yaml --output
results/support_desk` makes them. Where they are missing, these figures stay as they are.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor

from bloblora import posterior as q
from bloblora.evaluation import confidence_bins, reliability_figure, risk_coverage, risk_coverage_figure, save_figure
from bloblora.prediction import Prediction

FOLDER = Path(__file__).parent
RUNS = FOLDER.parents[1] / "results" / "support_desk" / "runs"
PRIOR_STD, STEPS, RATE, DRAWS = 1.5, 1500, 0.05, 10
BLUE, RED, GREY, YELLOW = "#2f5d8c", "#d1495b", "#9aa3ad", "#e0a030"
INPUTS = {"typical": (1.8, 0.2), "between": (0.05, 0.1), "unlike all": (0.3, 4.0)}


def main() -> None:
    """Draw all of them."""
    points, labels = data()
    mean, log_std = train(points, labels)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([q.sample(mean, log_std, "log", generator) for _ in range(DRAWS)])
    for name, figure in (
        ("draw", draw_figure(points, labels, mean, log_std.exp(), draws)),
        ("uncertainty", uncertainty_figure(draws)),
    ):
        save_figure(figure, FOLDER / f"{name}.svg")
    rows = {"LoRA": scores("lora", 0), "BLoB, N = 10": scores("blob", 10)}
    panels = {row: found for row, found in rows.items() if found}
    if panels.keys() == rows.keys():
        bins = {row: confidence_bins(*panel) for row, panel in panels.items()}
        curves = {row: risk_coverage(*panel) for row, panel in panels.items()}
        save_figure(reliability_figure(bins), FOLDER / "reliability.svg")
        save_figure(risk_coverage_figure(curves), FOLDER / "risk_coverage.svg")


def scores(method: str, samples: int) -> tuple[Tensor, Tensor] | None:
    """Confidence and whether the answer was right, (n,) each, of three seeds; None where the files are missing."""
    files = [RUNS / f"support_desk--{method}--seed{seed}.safetensors" for seed in range(3)]
    if not all(file.is_file() for file in files):
        print(f"no scores of {method} in {RUNS}; see the first lines of this file")
        return None
    found = [load_file(file) for file in files]
    confidence, right = (torch.cat([s[f"test/{samples}/{name}"] for s in found]) for name in ("confidence", "accuracy"))
    return confidence, right.bool()


def data() -> tuple[Tensor, Tensor]:
    """Two classes of inputs that differ along the first axis, and hardly vary along the second."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(16) % 2
    points = torch.randn(16, 2, generator=generator) * torch.tensor([0.9, 0.25])
    points[:, 0] += 2.4 * labels - 1.2
    return points, labels


def logits(points: Tensor, a: Tensor) -> Tensor:
    """W x = W₀ x + B A x with W₀ = 0, r = 1, B = (-½, ½)ᵀ: logits (n, 2) of points (n, 2)."""
    hidden = points @ a
    return torch.stack([-hidden, hidden], dim=-1) / 2


def train(points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """M and log Ω of A (2,): AdamW on the NLL and the KL together, as `BlobTrainer` does."""
    torch.manual_seed(0)
    mean = torch.zeros(2, requires_grad=True)
    log_std = q.init_std_parameter(mean, PRIOR_STD / 2, "log").requires_grad_()
    optimizer = torch.optim.AdamW([mean, log_std], RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, STEPS)
    for _ in range(STEPS):
        a = mean + torch.randn(2) * log_std.exp()
        kl = q.kl_divergence([mean], [log_std], PRIOR_STD, "log")
        loss = F.cross_entropy(logits(points, a), labels) + kl / len(points)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return mean.detach(), log_std.detach()


def draw_figure(points: Tensor, labels: Tensor, mean: Tensor, std: Tensor, draws: Tensor) -> Figure:
    """Left the Gaussian over A with its draws, right what each draw says of inputs."""
    figure = Figure(figsize=(8.4, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    angle = torch.linspace(0, 2 * torch.pi, 100)
    for scale, label in ((1, "1 and 2 standard deviations"), (2, None)):
        ellipse = mean[:, None] + scale * std[:, None] * torch.stack([angle.cos(), angle.sin()])
        left.plot(*ellipse.tolist(), color=GREY, linewidth=1, label=label)
    left.plot(*draws.T.tolist(), ".", color=BLUE, markersize=9, label=f"{DRAWS} weight samples")
    left.plot(*mean.tolist(), "x", color=RED, markersize=9, markeredgewidth=2.5, label="mean M")
    left.set(xlabel="A₁", ylabel="A₂", title="what BLoB learns: q(A)")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    for a, color, width in [*((a, BLUE, 0.8) for a in draws), (mean, RED, 2)]:
        right.axline((0, 0), (-a[1].item(), a[0].item()), color=color, linewidth=width, alpha=1 if width == 2 else 0.6)
    for label, marker in ((0, "o"), (1, "s")):
        right.plot(*points[labels == label].T.tolist(), marker, color="0.25", markersize=5, label=f"class {label}")
    for name, (x, y) in INPUTS.items():
        right.plot(x, y, "*", color=YELLOW, markersize=12)
        right.annotate(name, (x, y), xytext=(7, 4), textcoords="offset points", fontsize=9)
    right.set(xlim=(-4, 4), ylim=(-2, 5), xlabel="x₁", ylabel="x₂", title="each sample is a function: its boundary")
    right.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def uncertainty_figure(draws: Tensor) -> Figure:
    """Left each draw's probability and their mean, right the parts of the uncertainty."""
    points = torch.tensor([*INPUTS.values()])
    prediction = Prediction(torch.stack([logits(points, a).log_softmax(-1) for a in draws]), DRAWS)
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    place = torch.arange(len(INPUTS)).tolist()
    left.bar(place, prediction.probabilities[:, 1].tolist(), 0.5, color=GREY, label="their mean p̄")
    for i in place:
        left.plot([i] * DRAWS, prediction.draw_probabilities[:, i, 1].tolist(), ".", color=BLUE, markersize=8)
    left.plot([], [], ".", color=BLUE, markersize=8, label="each sample")
    left.set(ylabel="probability of class 1", ylim=(0, 1.25), title=f"{DRAWS} weight samples")
    aleatoric, epistemic = prediction.expected_entropy, prediction.predictive_entropy - prediction.expected_entropy
    right.bar(place, aleatoric.tolist(), 0.5, color=YELLOW, label="aleatoric: mean of H[pₛ]")
    right.bar(place, epistemic.tolist(), 0.5, bottom=aleatoric.tolist(), color=RED, label="epistemic: the rest")
    right.set(ylabel="nats", ylim=(0, 0.95), title="entropy of p̄, and its parts")
    for axes in (left, right):
        axes.set_xticks(place, [*INPUTS])
        axes.legend(frameon=False, fontsize=8, loc="upper center", ncols=2)
    for name, *values in zip(INPUTS, prediction.probabilities[:, 1], aleatoric, epistemic, strict=True):
        print(f"{name}: p̄ {values[0]:.2f}, aleatoric {values[1]:.2f}, epistemic {values[2]:.2f}")
    return figure


if __name__ == "__main__":
    main()
