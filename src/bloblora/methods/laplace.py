r"""Laplace-LoRA (Yang et al., arXiv 2308.13111; Daxberger et al., arXiv 2106.14806): a Gaussian around a trained LoRA.

.. math:: \theta_s \sim \mathcal N\big(\theta^*, (\mathrm{diag}_W(G_W \otimes A_W) + \delta I)^{-1}\big), \quad
    f_s(x) = f(x) + J(x)(\theta_s - \theta^*)

θ* is what plain training found. A_W is the mean of x̄x̄ᵀ over the training examples and G_W the sum of ĝĝᵀ: x̄ is the mean
of W's inputs over an example's positions, ĝ the sum of the gradients of log p(y|x) at its outputs, with labels y from
the model (the Fisher). This is KFAC-reduce (Eschenhagen et al., arXiv 2311.00636), for one loss an example. δ maximizes
the marginal likelihood, or with ``holdout`` the likelihood of held-out records under averaged draws.

laplace-torch would average the inputs over padding as well. Here a position counts if the logits have a gradient at it,
which leaves out padding and whatever else nothing reads; on what has no padding the tests compare the two. The package
needs torchvision, whose one build on PyPI breaks transformers where torch is the CPU build.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch
from peft import LoraConfig
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.func import jvp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from ..adapter import AdapterFileError
from ..checks import check_choice, check_positive
from ..contexts import hooked
from ..prediction import Sampler, predict
from ..prediction.sampler import Forward
from ..prediction.states import mean_where_read
from ..quantized import is_quantized
from ..tasks.likelihood import likelihood_of
from .method import Method, Training, read_state, write_state

_LONGEST_SIDE = 16_384  # a factor of 1 GB
_LOG_PRECISIONS = (-10.0, 10.0)  # what the published code's 100 steps of 0.1 reach
_HOLDOUT_SAMPLES, _HOLDOUT_ERROR = 10, 0.3  # of log δ: some nine predictions
_CLASSES_A_DRAW = 3  # a backward costs a third of a forward with tangents
_STATE = "laplace"
_FORWARD_MODE = Lock()
_WIDTH = "width"
_EIGEN = ("G_values", "A_values", "G_vectors", "A_vectors")

Subset = Literal["all", "last_layer"]


@dataclass(kw_only=True)
class LaplaceLora(Method):
    """A Gaussian over A and B of all layers, or over the last layer's weights; other weights stay a point."""

    subset_of_weights: Subset = field(
        default="all",
        metadata={
            "help": "`all`: A and B of every layer. `last_layer`: the linear layer of a classification head, and where "
            "there is none the LoRA of the last block that has one (arXiv 2106.14806)."
        },
    )
    prior_precision: float | None = field(
        default=None,
        metadata={
            "help": "δ; by default the one with the largest marginal likelihood. Where training has almost memorized "
            "its data the Fisher vanishes, that δ is far too small and draws are noise: use `holdout`."
        },
    )
    holdout: float = field(  # type: ignore[misc]  # an option here
        default=0.0,
        metadata={"help": "Share of the training records that δ is chosen on instead, by the lowest NLL; 0 for none."},
    )

    name = "laplace-lora"
    paper = "2308.13111"
    likelihoods = ("categorical", "bradley_terry", "bernoulli")
    weighs_classes = False
    post_hoc = True
    writes_text = False
    files = (*Method.files, f"{_STATE}.json")

    def __post_init__(self) -> None:
        check_choice("subset_of_weights", self.subset_of_weights, Subset)
        if self.prior_precision is not None:
            check_positive(self, "prior_precision")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout must be in [0, 1), got {self.holdout}")
        if self.holdout and self.prior_precision is not None:
            raise ValueError("holdout is for choosing prior_precision; leave one of them out")

    def layers(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The layers over whose weights the Gaussian is, of a model in training."""
        trained = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight.requires_grad}
        if self.subset_of_weights == "all":
            return {name: layer for name, layer in trained.items() if ".lora_" in name}
        last = list(trained)[-1]
        if ".lora_" not in last:
            return {last: trained[last]}
        block = re.match(r".*\.\d+\.", last)
        start = block[0] if block else last.partition(".lora_")[0]
        return {name: layer for name, layer in trained.items() if name.startswith(start)}

    def check_draws(self, num_samples: int) -> None:
        """Raises: a draw of a linearized model is no LoRA."""
        if num_samples:
            raise ValueError(
                f"method {self.name!r}: a draw of a linearized model is no adapter; export its mean (--samples 0, or "
                "--format merged without --draw), or a run of another method"
            )

    def prepare(self, base: PreTrainedModel, lora: LoraConfig) -> nn.Module:
        """The base with a fresh LoRA; raises a ValueError where a layer is too wide for Kronecker factors."""
        model = super().prepare(base, lora)
        for name, layer in self.layers(model).items():
            if max(shape := tuple(layer.weight.shape)) > _LONGEST_SIDE:
                limit = f"{self.name!r} takes at most {_LONGEST_SIDE} a side"
                raise ValueError(f"target_modules: {name} is {shape}; {limit}")
        return model

    def fit(self, model: nn.Module, training: Training) -> Sampler:
        """Train a plain LoRA unless it is trained, then fit the Gaussian."""
        training.train_lora(model)
        return fit_laplace(model.eval(), self.layers(model), training, self.prior_precision, held_out=self.holdout > 0)

    def save(self, model: nn.Module, sampler: Sampler, folder: Path) -> None:
        """Write the LoRA and the Gaussian."""
        assert isinstance(sampler, LinearizedDraws)
        super().save(model, sampler, folder)
        values = {name: getattr(sampler, name) for name in ("prior_precision", "log_marginal_likelihood")}
        write_state(folder, _STATE, {"layers": list(sampler.layers), **values}, sampler.eigen)

    def load(self, base: PreTrainedModel, folder: Path) -> tuple[nn.Module, Sampler]:
        """The LoRA and its Gaussian."""
        model, _ = super().load(base, folder)
        values, tensors = read_state(folder, _STATE)
        try:
            layers: dict[str, Any] = {name: model.get_submodule(name) for name in values.pop("layers")}
            return model, LinearizedDraws(layers, tensors, **values, reverse_only=_is_reverse_only(model))
        except (AttributeError, KeyError, TypeError) as error:
            raise AdapterFileError(f"{folder}: {_STATE}.json doesn't fit the model: {error}") from error


@dataclass(frozen=True)
class LinearizedDraws(Sampler):
    """Draws of a model that is linear in the Gaussian weights of its ``layers``.

    ``eigen`` has eigenvalues and eigenvectors of the factors, as they are saved, and the ``width`` τ by which draws are
    multiplied; ``prior_precision`` is δ, and ``log_marginal_likelihood`` that of the training data, in nats.
    ``reverse_only`` says that the model has no forward-mode derivative.
    """

    layers: Mapping[str, nn.Linear]
    eigen: dict[str, Tensor]
    prior_precision: float
    log_marginal_likelihood: float
    reverse_only: bool = False

    def __post_init__(self) -> None:
        self.eigen.setdefault(_WIDTH, torch.ones(()))

    def logits(self, forward: Forward, num_samples: int, seed: int) -> Iterator[Tensor]:
        """f + J(θ_s − θ*) of N draws; f with N = 0.

        J takes a backward a class, whatever N. For many classes each draw takes a forward-mode differentiation instead.
        """
        if not num_samples:
            yield forward()
            return
        generator = torch.Generator().manual_seed(seed)
        with torch.enable_grad(), _recorded(self.layers) as calls:
            logits = forward()
        if self.reverse_only or (logits.requires_grad and logits.shape[-1] <= _CLASSES_A_DRAW * num_samples):
            draws = [self.draw(generator) for _ in range(num_samples)]
            yield from logits.detach() + _along(logits, [calls[name] for name in self.layers], draws)
            return
        del logits, calls
        zero, one = torch.zeros(()), torch.ones(())
        for _ in range(num_samples):
            along = partial(_moved, forward, [*zip(self.layers.values(), self.draw(generator), strict=True)])
            # Other kernels have no forward mode, and torch has one nesting level of it for all threads.
            with _FORWARD_MODE, sdpa_kernel(SDPBackend.MATH):
                result = jvp(along, (zero,), (one,))
            yield result[0] + result[1]

    @property
    def scalable(self) -> LinearizedDraws:
        """Itself."""
        return self

    def spread(self) -> list[Tensor]:
        """The width."""
        return [self.eigen[_WIDTH]]

    def scale_(self, factor: float) -> None:
        """Multiply how far each draw is from θ* by a factor above 0, in place."""
        self.eigen[_WIDTH].mul_(factor)

    def draw(self, generator: torch.Generator) -> list[Tensor]:
        """θ_s − θ* of each layer, τ U_G (ε / √(λ_G λ_Aᵀ + δ)) U_Aᵀ with U and λ of G and A."""
        changes = []
        for name, layer in self.layers.items():
            g_values, a_values, g_vectors, a_vectors = (self.eigen[f"{name}.{part}"] for part in _EIGEN)
            noise = torch.randn(layer.weight.shape, generator=generator)
            noise *= (g_values.outer(a_values) + self.prior_precision).rsqrt() * self.eigen[_WIDTH]
            changes.append((g_vectors @ noise @ a_vectors.T).to(layer.weight))
        return changes


def _along(logits: Tensor, calls: list[tuple[Tensor, Tensor]], draws: list[list[Tensor]]) -> Tensor:
    """J(θ_s − θ*), (N, b, C), of logits (b, C), from each layer's input and output and the N changes of its weights."""
    inputs, outputs = zip(*calls, strict=True)
    changes = [torch.stack(of_layer) for of_layer in zip(*draws, strict=True)]
    result = logits.new_zeros(len(draws), *logits.shape)
    for column, one_hot in enumerate(torch.eye(logits.shape[-1]).to(logits)):
        slopes = torch.autograd.grad(logits, outputs, one_hot.expand_as(logits), retain_graph=True)
        for x, slope, change in zip(inputs, slopes, changes, strict=True):
            rows = slope.flatten(1, -2) if slope.dim() > 2 else slope.unsqueeze(1)
            gradients = rows.mT @ x.reshape(*rows.shape[:2], -1)  # of this logit of each input, (b, m, n)
            result[..., column] += change.flatten(1) @ gradients.flatten(1).T
    return result


def _is_reverse_only(model: nn.Module) -> bool:
    """Whether a forward-mode derivative would be an error, or wrong: bitsandbytes' 4-bit layers drop tangents."""
    return any(map(is_quantized, model.modules()))


def _moved(forward: Forward, changes: list[tuple[nn.Linear, Tensor]], time: Tensor) -> Tensor:
    """Logits where each layer's weights are moved by ``time`` times its change."""

    def move(change: Tensor, _: nn.Module, x: tuple[Tensor], y: Tensor) -> Tensor:
        return y + time.to(y) * F.linear(x[0], change)

    with hooked([(layer.register_forward_hook, partial(move, change)) for layer, change in changes]):
        return forward()


def fit_laplace(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    training: Training,
    prior_precision: float | None = None,
    *,
    held_out: bool = False,
) -> LinearizedDraws:
    """The Gaussian around the trained weights of some layers of a model in eval mode.

    Without ``prior_precision``, δ is the one with the largest marginal likelihood, or with ``held_out`` the one with
    the lowest NLL of ``training.holdout``.
    """
    factors, log_likelihood = kronecker_factors(model, layers, training)
    spectra = {name: [torch.linalg.eigh(factor) for factor in pair] for name, pair in zip(layers, factors, strict=True)}
    values = torch.cat([g.outer(a).flatten() for (g, _), (a, _) in spectra.values()]).clamp(min=0)
    squared_norm = sum(layer.weight.detach().double().square().sum().item() for layer in layers.values())

    def loss(log_precision: float) -> float:
        precision = math.exp(log_precision)
        return ((values / precision).log1p().sum().item() + precision * squared_norm) / 2 - log_likelihood

    def gaussian(precision: float) -> LinearizedDraws:
        return LinearizedDraws(layers, eigen, precision, -loss(math.log(precision)), reverse_only)

    reverse_only = _is_reverse_only(model)
    eigen = {
        f"{name}.{part}": tensor.float().contiguous()
        for name, ((g, u), (a, v)) in spectra.items()
        for part, tensor in zip(_EIGEN, (g.clamp(min=0), a.clamp(min=0), u, v), strict=True)
    }
    if prior_precision is not None:
        return gaussian(prior_precision)

    def held_out_nll(log_precision: float) -> float:
        options: Any = {"task": training.task, "sampler": gaussian(math.exp(log_precision))}
        prediction = predict(model, training.holdout, _HOLDOUT_SAMPLES, **options)
        likelihood = likelihood_of(training.task)
        labels = likelihood.targets([example["label"] for example in training.holdout])
        return -likelihood.averaged(prediction.draw_logits(), labels).mean().item()

    # The loss has one minimum: its derivative, (δ‖θ*‖² - γ(δ))/2 with γ the effective number of weights, only rises.
    objective, error = (held_out_nll, _HOLDOUT_ERROR) if held_out else (loss, 1e-5)
    found = minimize_scalar(objective, bounds=_LOG_PRECISIONS, method="bounded", options={"xatol": error})
    return gaussian(math.exp(found.x))


def kronecker_factors(model: Any, layers: Mapping[str, nn.Linear], training: Training) -> tuple[Any, float]:
    """[G, A] of each layer in float64 on the CPU, and the log-likelihood of the training examples."""
    task, examples = training.task, sorted(training.examples, key=training.task.length)
    likelihood = likelihood_of(task)
    size = training.arguments["per_device_train_batch_size"]
    generator = torch.Generator().manual_seed(training.arguments["seed"])
    factors = [[torch.zeros(n, n, dtype=torch.float64) for n in layer.weight.shape] for layer in layers.values()]
    log_likelihood = 0.0
    for start in range(0, len(examples), size):
        batch = {k: v.to(model.device) for k, v in task.collate(examples[start : start + size]).items()}
        with _recorded(layers) as calls:
            logits = task.logits(model, batch)
        log_likelihood += likelihood.log_prob(logits.detach(), batch["labels"]).sum().item()
        inputs, outputs = zip(*(calls[name] for name in layers), strict=True)
        slopes = torch.autograd.grad(logits, outputs, torch.ones_like(logits), retain_graph=True)
        for (_, a_factor), x, slope in zip(factors, inputs, slopes, strict=True):
            x = mean_where_read(x, slope)
            a_factor += (x.T @ x).to(a_factor) / len(examples)
        for cotangent in likelihood.fisher_root(logits.detach(), generator):
            gradients = torch.autograd.grad(logits, outputs, cotangent, retain_graph=True)
            for (g_factor, _), gradient in zip(factors, gradients, strict=True):
                g = gradient.reshape(len(gradient), -1, gradient.shape[-1]).sum(1)
                g_factor += (g.T @ g).to(g_factor)
    return factors, log_likelihood


@contextmanager
def _recorded(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Input and output of each layer in the forward inside."""
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def record(name: str, _: nn.Module, x: tuple[Tensor], y: Tensor) -> None:
        calls[name] = x[0].detach(), y if y.requires_grad else y.requires_grad_()  # gradients may begin here

    with hooked([(layer.register_forward_hook, partial(record, name)) for name, layer in layers.items()]):
        yield calls
