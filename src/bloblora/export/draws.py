"""Draws of a run as the weights of plain LoRAs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from .. import methods
from ..adapter import Posterior, debayesianize
from ..adapter.bayesianize import Weights
from ..adapter.variant import mean_of
from ..methods.ensemble import Members
from ..methods.scaled_a import ScaledA
from ..prediction import Point, Sampler, WeightDraws
from ..runs import RunError

MEAN = "mean"


@dataclass(frozen=True)
class Draw:
    """One function of a run, as an adapter.

    Attributes:
        name: ``mean``, or ``draw_00`` and so on.
        adapter_name: the adapter of the model that it changes.
        weights: A (r, n) or B (m, r), by layer and letter, that differ from that adapter's own.
    """

    name: str
    adapter_name: str
    weights: Weights = field(default_factory=dict)


def check_method(method: methods.Method, num_samples: int) -> None:
    """Raise a RunError where a method's functions aren't adapters; ``num_samples`` 0 asks for the mean alone."""
    if isinstance(method, methods.Temperature):
        raise RunError(
            f"method {method.inner.name!r} with temperature scaling: a temperature divides logits, which no weights of "
            "an adapter do; export a run that was trained without it"
        )
    if isinstance(method, methods.Laplace) and num_samples:
        raise RunError(
            f"method {method.name!r}: a draw of a linearized model is no adapter; export its mean (--samples 0, or "
            "--format merged without --draw), or a run of blob, bbb, ivon, tfb, scalabl, mc-dropout or ensemble"
        )


def take_draws(model: PeftModel, sampler: Sampler, num_samples: int, seed: int) -> list[Draw]:
    """The mean and the draws of `bloblora.predict` for this N and seed, in order.

    The model is a plain LoRA from then on. A method with fewer functions than N gives those that it has.
    """
    active = model.active_adapter
    names = [f"draw_{number:02d}" for number in range(num_samples)]
    if isinstance(sampler, Members):
        members = [*model.peft_config]
        return [Draw(MEAN, members[0]), *(Draw(*pair) for pair in zip(names, members, strict=False))]
    if isinstance(sampler, Point):
        return [Draw(name, active) for name in [MEAN, *names[:1]]]
    generator = torch.Generator().manual_seed(seed)
    drawn = [_sample(model, sampler, generator) for _ in names]
    debayesianize(model)
    return [Draw(MEAN, active), *(Draw(name, active, weights) for name, weights in zip(names, drawn, strict=True))]


@contextmanager
@torch.no_grad()
def in_force(model: PeftModel, draw: Draw) -> Iterator[None]:
    """The model's active adapter is the draw inside."""
    active = model.active_adapter
    model.set_adapter(draw.adapter_name)
    parameters = {
        (layer, factor): mean_of(model.get_submodule(layer), draw.adapter_name, factor)
        for layer, factors in draw.weights.items()
        for factor in factors
    }
    before = {key: parameter.clone() for key, parameter in parameters.items()}
    try:
        for (layer, factor), parameter in parameters.items():
            parameter.copy_(draw.weights[layer][factor])
        yield
    finally:
        for key, parameter in parameters.items():
            parameter.copy_(before[key])
        model.set_adapter(active)


@torch.no_grad()
def _sample(model: PeftModel, sampler: Sampler, generator: torch.Generator) -> Weights:
    """The weights of the next draw."""
    weights = sampler.weights if isinstance(sampler, WeightDraws) else None
    if isinstance(weights, Posterior):
        return weights.sample(generator)
    if not isinstance(weights, ScaledA):
        raise RunError(f"a draw of {type(weights or sampler).__name__} is no adapter; export the mean")
    with weights.draw(generator):
        return {
            name: {"A": mean_of(layer, model.active_adapter, "A").clone()}
            for name, layer in model.named_modules()
            if isinstance(layer, LoraLayer)
        }
