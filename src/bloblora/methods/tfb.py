r"""Training-free Bayesianization (Shi et al., arXiv 2412.05723): the widest noise that a trained LoRA stands.

With B = U diag(d) Vᵀ the adapter is rewritten, without changing it, and given noise of one size in the weights' space:

.. math:: B' = U\,\mathrm{diag}(d), \quad A' \sim \mathcal N(V^\top A,\ \Omega^2), \qquad \Omega_{ij} = \sigma_q / d_i

σq is the largest value, by bisection, under which the NLL of the model's own answers on training examples, averaged
over draws, rises by no more than a share ``tolerance``. The default is the published scripts' 0.003 times their 500
examples. Their other criterion, a share of answers that change, is too lax for a LoRA that knows its data by heart.
"""

from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import nn

from ..adapter import BlobConfig, Posterior, bayesianize
from ..prediction import Point, Prediction, Sampler, WeightDraws, predict
from ..training import check_positive
from .method import GaussianMethod, Training

_RANGE = (0.001, 0.2)
_BISECTIONS = 6
_NUM_SAMPLES = 4  # mirrored: as good as ten independent ones (results/approximations), and the search is its cost
_MOST_EXAMPLES = 256
_LEAST_NLL = 0.01  # below, a relative rise says nothing


@dataclass(kw_only=True)
class Tfb(GaussianMethod):
    """A Gaussian over A, set after training."""

    tolerance: float = field(
        default=1.5, metadata={"help": "Relative rise of the NLL that noise may cause.", "search": (0.5, 5.0)}
    )

    name = "tfb"
    paper = "2412.05723"
    post_hoc = True

    def __post_init__(self) -> None:
        check_positive(self, "tolerance")

    def fit(self, model: nn.Module, training: Training) -> Sampler:
        """Train a plain LoRA unless it is trained, then find σq."""
        assert isinstance(model, PeftModel)
        training.train_lora(model)
        examples = training.examples[:: max(1, -(-len(training.examples) // _MOST_EXAMPLES))]
        before = predict(model, examples, 0, task=training.task, sampler=Point())
        posterior, singular_values = rotate(model)
        search = WeightDraws(posterior, mirrored=True)

        def nll(prediction: Prediction) -> float:
            return nn.functional.nll_loss(prediction.log_probabilities, before.labels).item()

        allowed = nll(before) + self.tolerance * max(nll(before), _LEAST_NLL)
        low, high = _RANGE
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            _set_noise(posterior, singular_values, middle)
            after = predict(model, examples, _NUM_SAMPLES, task=training.task, sampler=search)
            low, high = (middle, high) if nll(after) <= allowed else (low, middle)
        _set_noise(posterior, singular_values, low)
        return WeightDraws(posterior)


@torch.no_grad()
def rotate(model: PeftModel) -> tuple[Posterior, dict[str, torch.Tensor]]:
    """Rewrite B as U diag(d) and A as Vᵀ A, in place; the posterior, and d (r,) of each of its factors by name."""
    posterior = bayesianize(model, BlobConfig())
    singular_values = {}
    for name, layer in posterior.named_layers().items():
        a, b = (getattr(layer, f"lora_{factor}")[posterior.adapter_name].weight for factor in "AB")
        u, d, vt = torch.linalg.svd(b.float(), full_matrices=False)
        b.copy_(u * d)
        a.copy_(vt @ a.float())
        singular_values[f"{name}.lora_A"] = d
    return posterior, singular_values


@torch.no_grad()
def _set_noise(posterior: Posterior, singular_values: dict[str, torch.Tensor], size: float) -> None:
    for name, parameter in posterior.named_std_parameters().items():
        d = singular_values[name]
        std = size / d.clamp_min(1e-6 * d.max()).clamp_min(1e-12)  # a row that B drops may have any noise
        parameter.copy_(std.sqrt()[:, None].expand_as(parameter))
