r"""Variational Bayesian last layer (Harrison, Willes & Snoek, arXiv 2404.11599) on a LoRA's classification head.

A Gaussian over the head's weights, one for each class c; φ is what the head reads, D the number of training examples:

.. math:: q(w_c) = \mathcal N(\bar w_c, S_c), \qquad p(w_c) = \mathcal N(0, \sigma_p^2 I), \quad \sigma_p^2 = s\,2/d

.. math:: \mathbb E_q[\log p(y \mid \phi, W)] \ge \bar w_y^\top \phi
          - \log \sum_c \exp\big(\bar w_c^\top \phi + \tfrac12 \phi^\top S_c\, \phi\big)

which is Jensen's inequality for the logarithm of the sum (their "discriminative classification"). Head and
LoRA are trained together on this bound and λ KL(q‖p)/D, without samples. Prior and start of S are those of the authors'
package, vbll. Two things differ from it. Logits have no noise of their own: it belongs to no function, and the bound is
largest without it. And S has a learning rate of its own, since at a LoRA's it would take thousands of steps to arrive.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..contexts import hooked
from ..messages import quoted
from ..prediction import Sampler
from ..prediction.hidden import mean_where_read, with_states
from ..prediction.sampler import Forward
from ..training import BlobTrainer, check_positive, check_std_learning_rate
from .method import PRIOR_IN_LOSS, Draw, Method, Training, load_added

_LOG_STD, _OFF_DIAGONAL = "vbll_log_std", "vbll_off_diagonal"


@dataclass(kw_only=True)
class Vbll(Method):
    """A Gaussian over the classification head."""

    covariance: Literal["diagonal", "dense"] = field(
        default="diagonal",
        metadata={"help": "S of each class: `diagonal`, or `dense`, with C·d² more weights for C labels and width d."},
    )
    prior_scale: float = field(
        default=1.0,
        metadata={"help": "s: the prior's variance of each weight is s·2/d, with d its inputs.", "search": (0.1, 10.0)},
    )
    kl_scale: float = field(
        default=1.0,
        metadata={"help": "λ, which multiplies the KL; lower trusts the data more.", "search": (0.01, 10.0)},
    )
    std_learning_rate: float | str | None = field(
        default="auto",
        metadata={"help": "Learning rate of S, whose logarithms Adam moves by about it a step; `auto`: see BLoB."},
    )

    name = "vbll"
    paper = "2404.11599"
    likelihoods = ("categorical",)
    weighs_classes = False
    training_defaults = PRIOR_IN_LOSS
    writes_text = False
    needs_head = True

    def __post_init__(self) -> None:
        check_positive(self, "prior_scale")
        check_std_learning_rate(self)
        check_positive(self, "kl_scale", or_zero=True)
        if self.covariance not in ("diagonal", "dense"):
            raise ValueError(f"covariance must be diagonal or dense, got {quoted(self.covariance)}")

    def check_draws(self, num_samples: int) -> None:
        """Raises: draws differ in the head, and one adapter is exported of it."""
        if num_samples:
            raise ValueError(
                f"method {self.name!r}: its draws differ in the classification head, not in the LoRA; export its mean "
                "(--samples 0, or --format merged without --draw), or a run of another method"
            )

    def prepare(self, base: PreTrainedModel, lora: LoraConfig) -> nn.Module:
        """The base with a fresh LoRA, and S on its head."""
        model = super().prepare(base, lora)
        self._add_covariance(model)
        return model

    def fit(self, model: nn.Module, training: Training) -> Sampler:
        """Train on the bound and the weighted KL."""
        layer = LastLayer(head_of(model))
        prior_variance = self.prior_scale * 2 / layer.head.in_features
        weight = self.kl_scale / len(training.examples)

        class Trainer(BlobTrainer):
            def std_parameters(self) -> list[Tensor]:
                return [*layer.covariance()]

            def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
                if not model.training:
                    return super().compute_loss(model, inputs, *args, **kwargs)
                with layer.recorded() as read:
                    nll, outputs = super().compute_loss(model, inputs, True)
                nll = nll + layer.excess(outputs["logits"], read[0])
                return self.with_penalty(nll, weight * layer.kl(prior_variance))

        training.run(model, trainer=Trainer, std_learning_rate=self.std_learning_rate)
        return LastLayerDraws(layer)

    def load(self, base: PreTrainedModel, folder: Path) -> tuple[nn.Module, Sampler]:
        """The LoRA and its head, of which PEFT saves S as a part."""
        model, _ = super().load(base, folder)
        self._add_covariance(model)
        return load_added(model, self.weights_file(folder)), LastLayerDraws(LastLayer(head_of(model)))

    def draws(self, model: PeftModel, sampler: Sampler, num_samples: int, seed: int) -> list[Draw]:
        """The mean, without S."""
        head = head_of(model)
        for name in (_LOG_STD, _OFF_DIAGONAL):
            if hasattr(head, name):
                delattr(head, name)
        return super().draws(model, sampler, num_samples, seed)

    def _add_covariance(self, model: nn.Module) -> None:
        head = head_of(model)
        std = torch.full_like(head.weight, 1 / head.in_features, dtype=torch.float32)
        head.register_parameter(_LOG_STD, nn.Parameter(std.log()))
        if self.covariance == "dense":
            zeros = std.new_zeros(*std.shape, head.in_features)
            head.register_parameter(_OFF_DIAGONAL, nn.Parameter(zeros))


def head_of(model: nn.Module) -> nn.Linear:
    """The last linear layer of the classification head that PEFT trains beside the LoRA.

    Raises:
        ValueError: there is none.
    """
    found = [m for n, m in model.named_modules() if ".modules_to_save." in n and isinstance(m, nn.Linear)]
    if not found:
        raise ValueError("model: no linear classification head is trained with the LoRA (modules_to_save)")
    return found[-1]


@dataclass(frozen=True)
class LastLayer:
    """The Gaussian over a head's weights (C, d), S = LLᵀ: the logarithms of L's diagonal, and what is below it."""

    head: nn.Linear

    def covariance(self) -> list[nn.Parameter]:
        """The parameters of S."""
        return [getattr(self.head, name) for name in (_LOG_STD, _OFF_DIAGONAL) if hasattr(self.head, name)]

    def spread(self) -> list[Tensor]:
        """The parameters of S."""
        return [*self.covariance()]

    @torch.no_grad()
    def scale_(self, factor: float) -> None:
        """Multiply L by a factor above 0, in place."""
        log_std, *off = self.covariance()
        log_std.add_(math.log(factor))
        for part in off:
            part.mul_(factor)

    def factor_times(self, x: Tensor) -> Tensor:
        """L x of each class, for x (..., C, d)."""
        log_std, *off = self.covariance()
        result = log_std.exp() * x
        return result + (off[0].tril(-1) @ x[..., None])[..., 0] if off else result

    def variance(self, states: Tensor) -> Tensor:
        """φᵀSφ = ‖Lᵀφ‖² of each class, (b, C), of φ (b, d)."""
        log_std, *off = self.covariance()
        if not off:
            return states.square() @ (2 * log_std).exp().T
        across = torch.einsum("bi,cij->bcj", states, off[0].tril(-1))
        return (across + states[:, None] * log_std.exp()).square().sum(-1)

    @contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """What the head reads in each forward inside; gradients can be taken with respect to it.

        The head's output is made to depend on S, by 0: DistributedDataParallel takes no gradient of what a forward
        doesn't use.
        """
        inputs: list[Tensor] = []

        def record(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            inputs.append(args[0] if args[0].requires_grad else args[0].detach().requires_grad_())
            return (inputs[-1],)

        def use(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            return output + 0 * sum(parameter.sum() for parameter in self.covariance())

        with hooked([(self.head.register_forward_pre_hook, record), (self.head.register_forward_hook, use)]):
            yield inputs

    def excess(self, logits: Tensor, read: Tensor) -> Tensor:
        """By how much the bound lies above the NLL of the mean logits (b, C), mean over the batch, of what was read."""
        (slope,) = torch.autograd.grad(logits, read, torch.ones_like(logits), retain_graph=True)
        variance = self.variance(mean_where_read(read, slope).float())
        return ((logits + variance / 2).logsumexp(-1) - logits.logsumexp(-1)).mean()

    def kl(self, prior_variance: float) -> Tensor:
        """KL(q‖p) in nats, in closed form."""
        log_std, *off = self.covariance()
        squares = self.head.weight.float().square().sum() + (2 * log_std).exp().sum()
        squares = squares + sum(part.tril(-1).square().sum() for part in off)
        constant = log_std.numel() * (math.log(prior_variance) - 1)
        return (squares / prior_variance + constant) / 2 - log_std.sum()


@dataclass(frozen=True)
class LastLayerDraws(Sampler):
    """Draws of the head's weights: N of them take one forward, for logits are linear in them."""

    layer: LastLayer

    def logits(self, forward: Forward, num_samples: int, seed: int) -> Iterator[Tensor]:
        """Logits of N draws, or of the mean."""
        if num_samples == 0:
            yield forward()
            return
        generator = torch.Generator().manual_seed(seed)
        logits, states = with_states(self.layer.head, forward)
        for _ in range(num_samples):
            yield logits + states @ self.change(generator).to(states).T

    @property
    def scalable(self) -> LastLayer:
        """S."""
        return self.layer

    @torch.no_grad()
    def change(self, generator: torch.Generator) -> Tensor:
        """W_s − W̄ = L ε of the next draw, (C, d)."""
        noise = torch.randn(self.layer.head.weight.shape, generator=generator, device=generator.device)
        return self.layer.factor_times(noise.to(self.layer.head.weight.device))
