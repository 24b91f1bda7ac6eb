r"""A mixture of Gaussians over A: several BLoB posteriors on one base model.

.. math:: q(A, B) = \frac1K \sum_{k=1}^K \delta(B - B_k)\, \mathcal N(A; M_k, \Omega_k^2)

One Gaussian knows what the data leave open around one solution; another start ends in another solution. Each component
is trained as `bloblora.methods.blob` is, on all records, from a start, with a head and in an order of data of its own.
Deep ensembles of variational posteriors are Wilson & Izmailov's MultiSWAG (arXiv 2002.08791) with BLoB's Gaussian.

The components share one base model and, where only its top is adapted, each batch's forward below. Draw s is of
component s mod K, so that N draws are spread evenly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle, islice

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..adapter import Posterior, bayesianize, debayesianize
from ..adapter.bayesianize import Weights
from ..prediction import Sampler
from ..prediction.forward import BatchForward
from ..prediction.sampler import DrawnLogits, Forward, draw_together, noted
from .blob import BlobOptions
from .ensemble import Ensemble, active, member_names
from .method import MEAN, Draw


@dataclass(kw_only=True)
class Mixture(BlobOptions, Ensemble):
    """Several Gaussians over A."""

    members: int = field(
        default=3, metadata={"help": "How many components, K; training costs K times one, prediction no more than one."}
    )

    name = "mixture"
    paper = "2002.08791"

    def __post_init__(self) -> None:
        BlobOptions.__post_init__(self)
        Ensemble.__post_init__(self)

    def prepare(self, base: PreTrainedModel, lora: LoraConfig) -> nn.Module:
        """The base with K fresh LoRAs of which the factors are Gaussian."""
        model = super().prepare(base, lora)
        for name in member_names(self.members):
            bayesianize(model, self.posterior_config(), name)  # type: ignore[arg-type]
        return model

    def sampler(self, model: PeftModel) -> Sampler:
        """Draws of all components."""
        return Components(model)

    def check_draws(self, num_samples: int) -> None:
        """Any number of draws: each is a LoRA."""

    def draws(self, model: PeftModel, sampler: Sampler, num_samples: int, seed: int) -> list[Draw]:
        """The first component's mean, and the draws of all components in turn."""
        assert isinstance(sampler, Components)
        weights = islice(sampler.draws(seed), num_samples)
        drawn = [Draw(f"draw_{i:02d}", posterior.adapter_name, own) for i, (posterior, own) in enumerate(weights)]
        for name in member_names(self.members):
            debayesianize(model, name)
        return [Draw(MEAN, member_names(self.members)[0]), *drawn]


class Components(Sampler):
    """The posteriors of all adapters of a model, of which successive draws take turns."""

    def __init__(self, model: PeftModel) -> None:
        self._model = model
        self._posteriors = [Posterior(model, name) for name in model.peft_config]

    @property
    def scalable(self) -> Components:
        """Itself: the spread around each mean, not that of the means."""
        return self

    def spread(self) -> list[Tensor]:
        """The unconstrained parameters of Ω of all components."""
        return [parameter for posterior in self._posteriors for parameter in posterior.spread()]

    def scale_(self, factor: float) -> None:
        """Multiply Ω of all components by a factor above 0, in place."""
        for posterior in self._posteriors:
            posterior.scale_(factor)

    def draws(self, seed: int) -> Iterator[tuple[Posterior, Weights]]:
        """One draw after the other, and whose it is."""
        seeds = torch.Generator().manual_seed(seed)
        each = [
            (posterior, torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=seeds))))
            for posterior in self._posteriors
        ]
        for posterior, generator in cycle(each):
            yield posterior, posterior.sample(generator)

    def logits(self, forward: Forward, num_samples: int, seed: int) -> Iterator[Tensor]:
        """Logits of N draws, or of the first component's mean."""
        if num_samples == 0:
            first = self._posteriors[0]
            with active(self._model, first.adapter_name), first.mean():
                logits = forward()
            yield logits
            return
        if isinstance(forward, BatchForward):
            forward.share_trunk(self._layers())
        several = self._posteriors[0].adapter_is_gaussian
        draws, left = self.draws(seed), num_samples if several else min(num_samples, len(self._posteriors))
        while left:
            count = sum(forward.wave(left)) if isinstance(forward, BatchForward) else 1
            yield from noted(forward, self._together(forward, [*islice(draws, count)]))
            left -= count

    def _layers(self) -> list[str]:
        return sorted({name for posterior in self._posteriors for name in posterior.layer_names()})

    def _together(self, forward: Forward, draws: list[tuple[Posterior, Weights]]) -> list[DrawnLogits]:
        """What each draw gives; those of one component share a forward."""
        found: dict[int, DrawnLogits] = {}
        for posterior in self._posteriors:
            own = {number: weights for number, (of, weights) in enumerate(draws) if of is posterior}
            if own:
                with active(self._model, posterior.adapter_name):
                    found |= zip(own, draw_together(posterior, forward, [*own.values()]), strict=True)
        return [found[number] for number in range(len(draws))]
