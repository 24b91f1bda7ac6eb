r"""IVON (Shen et al., arXiv 2402.17641; for LoRA: Cong et al., arXiv 2411.04421): a variational optimizer.

.. math:: q = \mathcal N\big(m,\ \tfrac{1}{\lambda (h + \delta)}\big) \text{ over A and B}

m and the Hessian's estimate h are the optimizer's own state; λ is the effective sample size, δ the weight decay. The
ivon-opt package does the optimization; afterwards its Gaussian is kept as any other here. A classification head is
trained by it as well, and predicts with its mean. Defaults are those of the authors' LoRA scripts for ARC and
OpenBookQA, but that the clip radius follows the number of steps; with them h hardly moves in some hundred steps, so
that the noise stays about 1/√(λ h₀) = 0.03.

The gradient g and the estimate of h, λ(h + δ)·ε∘g with the noise ε, are those of a step's mean loss. One ε serves all
micro-batches of a step, and ivon-opt is given their accumulated gradient once, at the last: it would otherwise average
the partial sums that it finds in ``grad`` after each.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import nn

from ..adapter import BlobConfig, bayesianize
from ..checks import check_positive
from ..prediction import Sampler, WeightDraws
from ..training import BlobTrainer
from .method import GaussianMethod, Training

_REACH = 10.0
"""Largest sum of an entry's steps at a constant learning rate of 1: 0.001 in each of the authors' 10,000 steps."""


@dataclass(kw_only=True)
class Ivon(GaussianMethod):
    """A Gaussian over A and B; δ, the prior's precision over λ, is the Trainer's ``weight_decay``."""

    effective_sample_size: float = field(
        default=1e6, metadata={"help": "λ; a larger one makes the posterior narrower.", "search": (3e5, 3e6)}
    )
    hess_init: float = field(
        default=1e-3, metadata={"help": "h at the start; with λ it decides the noise of the first steps."}
    )
    clip_radius: float | str = field(
        default="auto",
        metadata={
            "help": "Largest step of an entry, before it is multiplied by the learning rate. `auto`: 10 / steps, which "
            "is its authors' 0.001 in their 10,000 steps, so that a training of any length can go as far."
        },
    )

    name = "ivon"
    class_means = False
    paper = "2411.04421"
    training_defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 0.03}

    def __post_init__(self) -> None:
        check_positive(self, "effective_sample_size", "hess_init")
        check_positive(self, "clip_radius", or_word="auto")
        try:
            import ivon  # noqa: F401
        except ImportError as error:
            raise ValueError("method 'ivon' needs ivon-opt: pip install 'bloblora[methods]'") from error

    def check_run(self, lora: Mapping[str, Any], training: Mapping[str, Any]) -> None:
        """Raises: gradients would be scaled, of which h knows nothing."""
        if training.get("fp16"):
            raise ValueError("fp16 must be false for method 'ivon', whose h would see scaled gradients; use bf16")

    def fit(self, model: nn.Module, training: Training) -> Sampler:
        """Train with IVON, and keep its Gaussian."""
        assert isinstance(model, PeftModel)

        class Trainer(_Trainer):
            options = self

        loop = training.run(model, trainer=Trainer, max_grad_norm=0.0)
        assert isinstance(loop, _Trainer)
        stds = loop.stds()
        posterior = bayesianize(model, BlobConfig(factors="AB"))
        posterior.set_stds({name: stds[mean] for name, mean in posterior.named_means().items()})
        return WeightDraws(posterior)


class _Trainer(BlobTrainer):
    """The Trainer with IVON: each step's gradient is taken at a draw of the weights."""

    options: Ivon

    def create_optimizer(self, *_: Any, **__: Any) -> torch.optim.Optimizer:
        from ivon import IVON

        if self.optimizer is None:
            trained = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
            self.optimizer = IVON(
                trained,
                lr=self.args.learning_rate,
                ess=self.options.effective_sample_size,
                hess_init=self.options.hess_init,
                weight_decay=self.args.weight_decay,
                rescale_lr=False,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """As in the Trainer; the number of steps says what ``auto`` is."""
        radius = self.options.clip_radius
        for group in (optimizer or self.optimizer).param_groups:  # type: ignore[union-attr]
            group["clip_radius"] = _REACH / num_training_steps if radius == "auto" else radius
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        ivon = self._ivon()
        ivon.current_step = self.state.global_step  # which its state_dict lacks
        with ExitStack() as stack:
            with self._common_noise():  # of all micro-batches and processes, whose gradients are averaged
                stack.enter_context(ivon.sampled_params(train=self.accelerator.sync_gradients))
            return super().training_step(model, inputs, *args, **kwargs)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_optimizer_and_scheduler(self.state.best_model_checkpoint)  # h is its state

    def stds(self) -> dict[torch.Tensor, torch.Tensor]:
        """1/√(λ(h + δ)) of each parameter."""
        (group,) = self._ivon().param_groups
        stds = (group["ess"] * (group["hess"] + group["weight_decay"])).rsqrt()
        sizes = [parameter.numel() for parameter in group["params"]]
        return {p: std.view_as(p) for p, std in zip(group["params"], stds.split(sizes), strict=True)}

    def _ivon(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)
