r"""Training-free Bayesianization (Shi et al., arXiv 2412.05723): the widest noise that a trained LoRA stands.

With B = U diag(d) Vᵀ the adapter is rewritten, without changing it, and given noise of one size in the weights' space:

.. math:: B' = U\,\mathrm{diag}(d), \quad A' \sim \mathcal N(V^\top A,\ \Omega^2), \qquad \Omega_{ij} = \sigma_q / d_i

σq is the largest value under which the NLL of the model's own answers on training examples, the anchors, averaged over
draws, changes by no more than a share ``tolerance``: the paper's criterion, 0.3 %. The published scripts divide the
change by their 500 anchors, which allows 150 %, and have σq ≤ 0.015: there the ceiling decides. Both are options. The
search goes by bisection of log σq from 10⁻⁴; theirs is linear from 10⁻³ and ends at the smallest size that failed.
Their other criterion, a share of answers that change, is too lax for a LoRA that knows its data by heart. A share of
the NLL of values would mean nothing, which is 0 at some unit of theirs.
"""

import math
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F

from ..adapter import Posterior, bayesianize
from ..checks import check_choice, check_count, check_positive
from ..prediction import Point, Prediction, Sampler, TopBlocks, WeightDraws, predict
from ..prediction.forward import block_of
from ..tasks.likelihood import likelihood_of
from .method import GaussianMethod, Training

_BISECTIONS = 6
_NUM_SAMPLES = 4  # mirrored: as good as ten independent ones (results/approximations), and the search is its cost
_NO_NOISE = 1e-12  # below the rounding of a mean; at 0 the KL is infinite
Subset = Literal["all", "last_layer"]


@dataclass(kw_only=True)
class Tfb(GaussianMethod):
    """A Gaussian over A, set after training."""

    tolerance: float = field(
        default=0.003,
        metadata={
            "help": "Relative change of the NLL that noise may cause; 0.003 is the paper's.",
            "search": (1e-3, 2.0),
        },
    )
    divide_by_anchors: bool = field(
        default=False, metadata={"help": "Divide that change by the number of anchors, as the published scripts do."}
    )
    num_anchors: int = field(
        default=500, metadata={"help": "Most training records that the NLL is taken on; the paper has 500."}
    )
    min_std: float = field(default=1e-4, metadata={"help": "Smallest noise σq of the search."})
    max_std: float = field(
        default=0.2, metadata={"help": "Largest noise σq of the search; the published scripts have 0.015."}
    )
    subset_of_weights: Subset = field(
        default="all",
        metadata={"help": "Layers with noise: `all`, or `last_layer`: those of the last block that has a LoRA."},
    )

    name = "tfb"
    paper = "2412.05723"
    likelihoods = ("categorical", "bradley_terry", "bernoulli", "tags")
    post_hoc = True

    def __post_init__(self) -> None:
        check_positive(self, "tolerance", "min_std", "max_std")
        check_count("num_anchors", self.num_anchors, 1)
        if self.min_std >= self.max_std:
            raise ValueError(f"min_std must be below max_std {self.max_std}, got {self.min_std}")
        check_choice("subset_of_weights", self.subset_of_weights, Subset)

    def fit(self, model: nn.Module, training: Training) -> Sampler:
        """Train a plain LoRA unless it is trained, then find σq.

        Warns where the smallest noise of the search changes the NLL by more than the tolerance; it is kept.
        """
        assert isinstance(model, PeftModel)
        training.train_lora(model)
        anchors = training.examples[:: -(-len(training.examples) // self.num_anchors)]
        before = predict(model, anchors, 0, task=training.task, sampler=Point())
        posterior, singular_values = rotate(model)
        layers = posterior.layer_names() if self.subset_of_weights == "all" else last_layers(posterior)
        search = WeightDraws(posterior, mirrored=True)
        if layers != posterior.layer_names() and (place := block_of(model, layers[0])):  # the blocks below, once
            blocks = [*model.get_submodule(place[0]).children()]
            search = WeightDraws(TopBlocks(posterior, len(blocks) - place[1]), mirrored=True)

        likelihood, answers = likelihood_of(training.task), before.labels.long()

        def nll(prediction: Prediction) -> float:
            return -likelihood.averaged(prediction.draw_logits(), answers).mean().item()

        share = self.tolerance * (len(anchors) if self.divide_by_anchors else 1)

        def passes(size: float) -> bool:
            set_noise(posterior, singular_values, size, layers)
            after = predict(model, anchors, _NUM_SAMPLES, task=training.task, sampler=search)
            return abs(nll(after) - nll(before)) <= share * nll(before)

        set_noise(posterior, singular_values, self._largest(passes), layers)
        return WeightDraws(posterior)

    def _largest(self, passes: Callable[[float], bool]) -> float:
        """The largest size of noise in the range that passes, but for 1 part in (``max_std``/``min_std``)^(1/64)."""
        low, high = self.min_std, self.max_std
        if passes(high):
            return high
        if not passes(low):
            warnings.warn(
                f"min_std {low} already changes the NLL of the LoRA's answers by more than tolerance {self.tolerance} "
                "allows, and is kept; raise tolerance, or lower min_std. A LoRA that knows its training records by "
                "heart has an NLL near 0, of which any share is small.",
                stacklevel=1,
            )
            return low
        for _ in range(_BISECTIONS):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if passes(middle) else (low, middle)
        return low


def last_layers(posterior: Posterior) -> list[str]:
    """The layers that stand in one block of the model with the last one; the last one alone where it is in none."""
    names = posterior.layer_names()
    last = block_of(posterior.model, names[-1])
    return [name for name in names if block_of(posterior.model, name) == last] if last else names[-1:]


@torch.no_grad()
def rotate(model: PeftModel) -> tuple[Posterior, dict[str, torch.Tensor]]:
    """Rewrite B as U diag(d) and A as Vᵀ A, in place; the posterior, and d (r,) of each of its layers by name."""
    posterior = bayesianize(model)
    singular_values = {}
    for name, layer in posterior.named_layers().items():
        a, b = (getattr(layer, f"lora_{factor}")[posterior.adapter_name].weight for factor in "AB")
        u, d, vt = torch.linalg.svd(b.float(), full_matrices=False)
        rows = vt @ a.float()
        # With fewer outputs than r the rest of B is 0, and what A has there does nothing.
        a.zero_()[: len(d)] = rows
        b.zero_()[:, : len(d)] = u * d
        singular_values[name] = F.pad(d, (0, len(a) - len(d)))
    return posterior, singular_values


def set_noise(
    posterior: Posterior, singular_values: dict[str, torch.Tensor], size: float, layers: Collection[str]
) -> None:
    """Give the named layers noise of size σq, and the others none."""
    stds = {}
    for name, d in singular_values.items():
        std = size / d.clamp_min(1e-6 * d.max()).clamp_min(1e-12)  # a row that B drops may have any noise
        stds[f"{name}.lora_A"] = (std if name in layers else torch.full_like(d, _NO_NOISE))[:, None]
    posterior.set_stds(stds)
