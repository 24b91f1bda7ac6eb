r"""Maximum a posteriori: a Gaussian prior on A and B as weight decay.

.. math:: \min_{A, B}\ \frac1D \Big[\sum_k -\log p(y_k \mid x_k, A, B) + \frac{\|A\|^2 + \|B\|^2}{2\sigma_p^2}\Big]

The penalty is part of the loss (L2), so that the optimum is the MAP estimate itself; with AdamW's decoupled decay it is
not (Loshchilov & Hutter, arXiv 1711.05101). ``prior_std`` is BLoB's (arXiv 2406.11675, which has this baseline).
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..checks import check_positive
from ..prediction import Point, Sampler
from ..training import BlobTrainer
from .method import PRIOR_IN_LOSS, Method, Training


@dataclass(kw_only=True)
class Map(Method):
    """A point, held to 0 by the prior."""

    prior_std: float = field(
        default=0.2, metadata={"help": "σp of the prior N(0, σp²) on each entry of A and B.", "search": (0.03, 0.6)}
    )

    name = "map"
    paper = "2406.11675"
    training_defaults = PRIOR_IN_LOSS
    deterministic = True

    def __post_init__(self) -> None:
        check_positive(self, "prior_std")

    def fit(self, model: nn.Module, training: Training) -> Sampler:
        """Train with the penalty."""
        precision = 1 / self.prior_std**2

        class Trainer(BlobTrainer):
            def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
                loss = super().compute_loss(model, *args, **kwargs)
                if not model.training:
                    return loss
                return self.with_penalty(loss, precision / 2 * squared_norm(model) / len(training.examples))

        training.run(model, trainer=Trainer)
        return Point()


def squared_norm(model: nn.Module) -> Tensor:
    """‖A‖² + ‖B‖² of all LoRA layers that are trained."""
    return sum(p.square().sum() for n, p in model.named_parameters() if p.requires_grad and ".lora_" in n)  # type: ignore[return-value]
