r"""SWAG over LoRA (Onal et al., arXiv 2405.03425; SWAG: Maddox et al., arXiv 1902.02476): a Gaussian of late iterates.

.. math:: \theta = \bar\theta + \sqrt{c}\,\Big(\Sigma_{\mathrm{diag}}^{1/2} z_1 + \frac{1}{\sqrt{K-1}} D z_2\Big),
    \qquad z_1, z_2 \sim \mathcal N(0, I)

θ is A and B of all layers. After a burn-in, n iterates are collected at equal distances: their mean :math:`\bar\theta`
(SWA, Izmailov et al., arXiv 1803.05407; N = 0), their variances :math:`\Sigma_{\mathrm{diag}}`, and the last K of
:math:`\theta_i - \bar\theta_i`, each from the mean of its time, as columns of D. One z₂ serves all layers. c = ½ is
SWAG's; the code of arXiv 2405.03425 has 1 by default. A classification head is averaged too, and has no noise.

The learning rate falls linearly from its warm-up to ``collect_rate`` of it at the end of the burn-in and then stays, or
goes in cycles. Burn-in, rate, n and K are near the published code's: half of 15 to 18 epochs, a tenth to a sixth of the
learning rate, an iterate an epoch, K = 5. There K − 1 is the option's also where D has fewer columns; here it is D's.

Validation evaluates the mean of the iterates so far, once there are two. The checkpoint that is kept is the best of
those that have two, and its iterates are the ones that count.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainerCallback

from ..adapter import AdapterFileError, BlobConfig, bayesianize, find_posterior
from ..checks import check_choice, check_count, check_positive
from ..files import read_tensors, write_tensors
from ..messages import quoted
from ..prediction import Sampler, WeightDraws
from ..prediction.approximations import OfPosterior
from ..training import BlobTrainer
from .method import GaussianMethod, Training, read_state, write_state

if TYPE_CHECKING:
    from peft import PeftModel

    from ..adapter.bayesianize import Weights

_STATE = "swag"
_SCHEDULE = "constant_with_warmup"
_CYCLE_END = 0.01  # of a cycle's first rate, as in arXiv 1803.05407
_LEAST_VARIANCE = 1e-30
Cycles = Literal["constant", "cyclical"]


@dataclass(kw_only=True)
class Swag(GaussianMethod):
    """A Gaussian over A and B, diagonal plus low rank, from the iterates of a training."""

    burn_in: float = field(
        default=0.5,
        metadata={
            "help": "Share of the steps before iterates are collected; the last two steps always are.",
            "search": (0.25, 0.9),
        },
    )
    num_iterates: int = field(
        default=10, metadata={"help": "Iterates that are collected, n, fewer where fewer steps are left; at least 2."}
    )
    covariance_rank: int = field(
        default=5, metadata={"help": "Columns of D, K: the last so many iterates; 0 for a diagonal covariance."}
    )
    collect_rate: float = field(
        default=0.1,
        metadata={
            "help": "Learning rate while iterates are collected, as a share of `learning_rate`. Larger widens the "
            "posterior.",
            "search": (0.03, 1.0),
        },
    )
    collect_schedule: Cycles = field(
        default="constant",
        metadata={
            "help": "How that rate goes: `constant`, or `cyclical`: it falls to a hundredth before each iterate "
            "(arXiv 1803.05407)."
        },
    )
    covariance_scale: float = field(
        default=0.5,
        metadata={
            "help": "c, which multiplies the covariance; with D, 0.5 is SWAG's. 1 for a diagonal covariance.",
            "search": (0.1, 1000.0),
        },
    )

    name = "swag"
    class_means = False
    paper = "2405.03425"
    gaussian = False  # its draws have more than the posterior's independent noise
    training_defaults: ClassVar[Mapping[str, Any]] = {"lr_scheduler_type": _SCHEDULE}
    files = (*GaussianMethod.files, f"{_STATE}.json")

    def __post_init__(self) -> None:
        if not 0 <= self.burn_in < 1:
            raise ValueError(f"burn_in must be in [0, 1), got {quoted(self.burn_in)}")
        check_count("num_iterates", self.num_iterates, 2)
        check_count("covariance_rank", self.covariance_rank, 0)
        if self.covariance_rank == 1:
            raise ValueError("covariance_rank must be 0, or at least 2, got 1")
        check_positive(self, "collect_rate", "covariance_scale")
        check_choice("collect_schedule", self.collect_schedule, Cycles)

    def check_run(self, lora: Mapping[str, Any], training: Mapping[str, Any]) -> None:
        """Raises: there is another learning rate schedule, or too few steps."""
        if (schedule := training["lr_scheduler_type"]) != _SCHEDULE:
            raise ValueError(
                f"lr_scheduler_type must be {_SCHEDULE!r} for method 'swag', which says how the rate falls; "
                f"got {quoted(schedule)}"
            )
        if isinstance(training["max_steps"], int) and training["max_steps"] > 0:
            self.collected(training["max_steps"])

    def collected(self, steps: int) -> list[int]:
        """After which steps of a training iterates are collected, rising; the last one is.

        Raises:
            ValueError: there are fewer than two steps.
        """
        left = steps - self._start(steps)
        count = min(self.num_iterates, left)
        return [*range(steps - (count - 1) * (left // count), steps + 1, left // count)]

    def rate(self, step: int, steps: int, warmup: int) -> float:
        """Factor of the learning rate in a step, counted from 0."""
        if step < warmup:
            return step / warmup
        if step < (start := self._start(steps)):
            return 1 - (1 - self.collect_rate) * (step - warmup) / (start - warmup)
        first, second, *_ = self.collected(steps)
        if self.collect_schedule == "constant" or step < 2 * first - second:
            return self.collect_rate
        place = ((step - first) % (second - first) + 1) / (second - first)
        return self.collect_rate * (1 - (1 - _CYCLE_END) * place)

    def _start(self, steps: int) -> int:
        """Steps of the burn-in."""
        if steps < 2:
            raise ValueError(f"max_steps is {steps}; method 'swag' needs at least 2, for the iterates of its last two")
        return min(math.floor(self.burn_in * steps), steps - 2)

    def fit(self, model: nn.Module, training: Training) -> Sampler:
        """Train a LoRA, and put the mean of its iterates in its place.

        Warns where the training ended before there were two; then there is one function.
        """
        iterates = Iterates(model)

        class Trainer(_Trainer):
            method, collector = self, iterates

        training.run(model, trainer=Trainer)
        if iterates.count < 2:
            warnings.warn(
                f"the training ended with {iterates.count} iterates, so that all samples are the same; SWAG "
                "collects them late: let it run for max_steps, or lower burn_in",
                stacklevel=1,
            )
            iterates = Iterates(model)
            iterates.collect(0)
        posterior = bayesianize(model, BlobConfig(factors="AB"))  # type: ignore[arg-type]
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, mean in iterates.means.items():
                parameters[name].copy_(mean)
        names = {parameter: name for name, parameter in parameters.items()}
        of_factor = {name: names[factor] for name, factor in posterior.named_means().items()}
        variances = {name: iterates.variance(own).clamp_min(_LEAST_VARIANCE) for name, own in of_factor.items()}
        posterior.set_stds({name: (self.covariance_scale * variance).sqrt() for name, variance in variances.items()})
        columns = {}
        if (rank := min(self.covariance_rank, iterates.count)) > 1:
            size = math.sqrt(self.covariance_scale / (rank - 1))
            columns = {name: size * iterates.columns(of_factor[name], rank) for name in of_factor}
        return WeightDraws(LowRank(posterior, columns))

    def save(self, model: nn.Module, sampler: Sampler, folder: Path) -> None:
        """Write the mean and the diagonal as a Bayesian adapter, and the columns beside it."""
        assert isinstance(sampler, WeightDraws)
        assert isinstance(sampler.weights, LowRank)
        super().save(model, sampler, folder)
        write_state(folder, _STATE, {}, sampler.weights.columns)

    def load(self, base: PreTrainedModel, folder: Path) -> tuple[nn.Module, Sampler]:
        """The mean, and both parts of its noise."""
        model, _ = super().load(base, folder)
        posterior = find_posterior(model)
        assert posterior is not None
        return model, WeightDraws(LowRank(posterior, read_state(folder, _STATE)[1]))

    def draw_weights(self, model: PeftModel, sampler: Sampler, generator: torch.Generator) -> Weights:
        """A and B of every layer."""
        assert isinstance(sampler, WeightDraws)
        assert isinstance(sampler.weights, LowRank)
        return sampler.weights.sample(generator)


class Iterates:
    """Mean and deviations of what a model trains, over the iterates that it was given; all float32.

    Attributes:
        count: iterates so far, n.
        means: running mean of each parameter by its name.
    """

    def __init__(self, model: nn.Module) -> None:
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.count = 0
        self.means = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self._trained.items()}
        self._squares = {name: torch.zeros_like(mean) for name, mean in self.means.items()}
        self._columns: dict[str, list[Tensor]] = {name: [] for name in self._trained if ".lora_" in name}

    @torch.no_grad()
    def collect(self, rank: int) -> None:
        """Add the model's present weights, by Welford's update; the last ``rank`` deviations are kept."""
        self.count += 1
        for name, parameter in self._trained.items():
            mean, before = self.means[name], parameter.float() - self.means[name]
            mean += before / self.count
            after = parameter.float() - mean
            self._squares[name] += before * after
            if name in self._columns:
                self._columns[name] = [*self._columns[name], after][-rank:] if rank else []

    def variance(self, name: str) -> Tensor:
        """Variance over the n iterates, of a parameter's shape."""
        return self._squares[name] / self.count

    def columns(self, name: str, rank: int) -> Tensor:
        """The last deviations, each from the mean of its time, (rank, ...)."""
        return torch.stack(self._columns[name][-rank:])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model has the means inside; then its weights are as they were, to the bit."""
        before = {name: parameter.detach().clone() for name, parameter in self._trained.items()}
        try:
            self._put(self.means)
            yield
        finally:
            self._put(before)

    def save(self, file: Path) -> None:
        """Write all that `load` needs."""
        tensors = {"count": torch.tensor(self.count)}
        for name, mean in self.means.items():
            tensors |= {f"mean.{name}": mean, f"squares.{name}": self._squares[name]}
            if self._columns.get(name):
                tensors[f"columns.{name}"] = torch.stack(self._columns[name])
        write_tensors(file, tensors)

    def load(self, file: Path) -> None:
        """Go on where a saved one was.

        Raises:
            AdapterFileError: the file is missing or damaged, or of another model.
        """
        tensors = read_tensors(file, AdapterFileError)
        if missing := [name for name in self.means if f"mean.{name}" not in tensors]:
            raise AdapterFileError(f"{file}: it has no mean of {missing[0]}; it is of another model")
        self.count = int(tensors["count"])
        for name, mean in self.means.items():
            mean.copy_(tensors[f"mean.{name}"])
            self._squares[name].copy_(tensors[f"squares.{name}"])
            if name in self._columns:
                self._columns[name] = [*tensors.get(f"columns.{name}", torch.empty(0)).to(mean.device)]

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self._trained.items():
            parameter.copy_(weights[name])


class _Collect(TrainerCallback):
    """Collects iterates after the steps that a method says."""

    def __init__(self, method: Swag, iterates: Iterates) -> None:
        self._method, self._iterates = method, iterates

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self._method.collected(state.max_steps):
            self._iterates.collect(self._method.covariance_rank)


class _Trainer(BlobTrainer):
    """The Trainer with SWAG's learning rate, whose evaluations are of the mean; a checkpoint holds the moments."""

    method: Swag
    collector: Iterates

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_Collect(self.method, self.collector))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            factor = partial(self.method.rate, steps=num_training_steps, warmup=warmup)
            factor(num_training_steps - 1)  # too few steps are an error now
            optimizer = optimizer or self.optimizer
            self.lr_scheduler = LambdaLR(optimizer, factor)
        return self.lr_scheduler

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.collector.count < 2:
            return super().evaluate(*args, **kwargs)
        with self.collector.averaged():
            return super().evaluate(*args, **kwargs)

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        second = self.method.collected(self.state.max_steps)[1]
        if (self.state.best_global_step or 0) < second <= self.state.global_step:
            self.state.best_metric = None  # weights of the burn-in, however good, are no Gaussian
        return super()._determine_best_metric(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Not after the Trainer's state, whose file makes a checkpoint complete.
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self.collector.save(Path(output_dir, f"{_STATE}.safetensors"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.collector.load(Path(checkpoint, f"{_STATE}.safetensors"))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.collector.load(Path(str(self.state.best_model_checkpoint), f"{_STATE}.safetensors"))


@dataclass(frozen=True)
class LowRank(OfPosterior):
    """A posterior with independent noise, and noise along common directions of all layers.

    Attributes:
        posterior: mean and independent noise.
        columns: of each factor by its name in the posterior, (K, r, n) or (K, m, r): the covariance of all entries
            together is diag(Ω²) + C Cᵀ; empty for none.
    """

    columns: dict[str, Tensor]

    def spread(self) -> list[Tensor]:
        """The parameters of Ω, and C."""
        return [*self.posterior.spread(), *self.columns.values()]

    def scale_(self, factor: float) -> None:
        """Multiply Ω and C by a factor above 0, in place."""
        self.posterior.scale_(factor)
        for columns in self.columns.values():
            columns.mul_(factor)

    def sample(self, generator: torch.Generator) -> Weights:
        """The weights of the next draw."""
        weights = self.posterior.sample(generator)
        if self.columns:
            rank = len(next(iter(self.columns.values())))
            noise = torch.randn(rank, generator=generator, device=generator.device)
            for name, columns in self.columns.items():
                layer, _, factor = name.rpartition(".lora_")
                weight = weights[layer][factor]
                weights[layer][factor] = weight + torch.tensordot(noise, columns.to(noise), 1).to(weight)
        return weights
