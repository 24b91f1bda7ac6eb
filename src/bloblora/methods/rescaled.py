r"""One scale τ of the posterior's width and one temperature T, fitted together on records that training hasn't seen.

.. math:: \bar p(y \mid x) = \frac1N \sum_s \mathrm{softmax}\big(f(x;\, M + \tau\,\Omega \circ E_s)/T\big)_y, \qquad
          (\tau, T) = \arg\min \sum_{k \in \text{held out}} -\log \bar p(y_k \mid x_k) + \tfrac12 (\log T)^2

It goes on top of any method. T alone is temperature scaling (Guo et al., arXiv 1706.04599), here with a prior of log T
(`bloblora.prediction.fit_temperature`); τ is searched where the spread of a method's draws can be scaled
(`bloblora.prediction.ScalableWeights`). The noise E is the same for every τ, so that the objective is smooth. Each τ
costs N passes over the records, and the mean alone, τ = 0, one, which gives it a T of its own. To second order in the
noise's variance the NLL is a parabola in τ²: where the mean alone is better than τ = 1, its lowest point is below
τ² = 1/2, and above it otherwise. So τ is halved from 1 in the one case, or doubled in the other, while that helps.

Few records overfit two numbers. So of all τ whose NLL is above the lowest by no more than a standard error of the
paired difference, or 0.01 nats, the one nearest to 1 is taken, to a factor of √2: of models that the data can't tell
apart the simplest (the one-standard-error rule of Breiman, Friedman, Olshen & Stone, Classification and Regression
Trees, 1984). It keeps what draws say of inputs unlike the records, which the NLL of records doesn't show.

The records are those of validation, or all training records by cross-validation (Stone 1974): each is predicted by a
model that was trained without it, and the run's own training has them all.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..adapter import AdapterFileError, Posterior
from ..adapter.sharding import put_, whole
from ..data.records import first_copies, grouped
from ..prediction import Prediction, Sampler, ScalableWeights, Tempered, fit_temperature, predict, tempered_nll
from ..prediction.kinds import prediction_of
from ..prediction.trunk_cache import ROW
from ..tasks.likelihood import CATEGORICAL, Likelihood, likelihood_of
from ..tasks.task import Example
from .method import Draw, Method, Training, read_state, write_state

_FILE = "temperature"
_NUM_SAMPLES = 10
_MOST = 16.0  # times wider or narrower, beyond which τ isn't tried
_NO_LOSS = 0.01  # nats a record
_NO_WIDTH = 1e-6  # what is saved for τ = 0: no draw shows it in float32, and the KL is finite
# What is the inner method's: attributes, and functions.
_INNERS = (
    *("name", "paper", "training_defaults", "lora_defaults"),
    *("starts_from_lora", "post_hoc", "whole_model", "gaussian", "takes_prior", "deterministic"),
    *("sharded", "likelihoods", "weighs_classes", "check_run", "check_draws", "described", "holdout", "prepare"),
    "weights_file",
)


@dataclass(kw_only=True)
class Rescaled(Method):
    """Another method with τ and T.

    Attributes:
        inner: the other method.
        folds: K of a cross-validation, in place of held-out records.
        seed: of the folds.
    """

    inner: Method
    folds: int | None = None
    seed: int = 0

    writes_text = False

    def __post_init__(self) -> None:
        for attribute in _INNERS:
            setattr(self, attribute, getattr(self.inner, attribute))
        self.files = (*self.inner.files, f"{_FILE}.json")  # type: ignore[misc]

    def fit(self, model: nn.Module, training: Training) -> Sampler:
        """Train, or K times without a fold and then on all; then fit τ and T."""
        parts = [*self._out_of_fold(model, training)] if self.folds else []
        sampler = self.inner.fit(model, training)
        parts = parts or [_HeldOut(model, sampler, training.validation, training.task)]
        scales, report = fit_scales(parts, likelihood := likelihood_of(training.task))
        if not self.folds:
            training.predicted = parts[0].predicted(scales, likelihood)
        if scales.width not in (None, 1):
            assert sampler.scalable is not None
            sampler.scalable.scale_(scales.width or _NO_WIDTH)
        training.found["rescaling"] = report | ({"folds": self.folds} if self.folds else {})
        return Tempered(sampler, **asdict(scales))

    def save(self, model: nn.Module, sampler: Sampler, folder: Path) -> None:
        """Write the inner method's files, in which τ is a part of the posterior, and T.

        A posterior keeps T as well: its folder is read by `bloblora.load`, which knows of no runs.
        """
        assert isinstance(sampler, Tempered)
        if isinstance(posterior := sampler.scalable, Posterior):
            of_mean = sampler.temperature_of_mean
            posterior.temperatures = (of_mean if sampler.width == 0 else sampler.temperature, of_mean)
        self.inner.save(model, sampler.sampler, folder)
        write_state(folder, _FILE, {scale.name: getattr(sampler, scale.name) for scale in fields(Scales)})

    def load(self, base: PreTrainedModel, folder: Path) -> tuple[nn.Module, Sampler]:
        """The inner method's model and sampler, and T."""
        model, sampler = self.inner.load(base, folder)
        values = read_state(folder, _FILE)[0]
        try:
            return model, Tempered(sampler, **values)
        except (TypeError, ValueError) as error:
            raise AdapterFileError(f"{folder / f'{_FILE}.json'}: {error}") from error

    def draws(self, model: PeftModel, sampler: Sampler, num_samples: int, seed: int) -> list[Draw]:
        """The inner method's: what has them divides their logits by T."""
        assert isinstance(sampler, Tempered)
        return self.inner.draws(model, sampler.sampler, num_samples, seed)

    def _out_of_fold(self, model: nn.Module, training: Training) -> Iterator[_HeldOut]:
        """Each fold with a model that was trained on the others."""
        assert self.folds is not None
        examples, output = training.examples, training.arguments["output_dir"]
        for number, fold in enumerate(folds(examples, self.folds, self.seed), start=1):
            left_out = {*fold}
            part = replace(
                training,
                examples=[example for i, example in enumerate(examples) if i not in left_out],
                arguments=training.arguments | {"output_dir": str(Path(output, f"fold_{number}_of_{self.folds}"))},
                validated=[],
                found={},
            )
            trained = _copy(model)
            sampler = self.inner.fit(trained, part)
            yield _HeldOut(trained, sampler, [examples[i] for i in fold], training.task)


@dataclass(frozen=True)
class Scales:
    """T, the T of the mean alone, and τ; None where draws can't be scaled."""

    temperature: float
    temperature_of_mean: float
    width: float | None


@dataclass(frozen=True)
class _Tried:
    """A τ and its best T, and the NLL of each held-out record, nats, (n,): under both, and under τ alone."""

    width: float
    temperature: float
    nll: Tensor
    nll_of_width: Tensor


class _HeldOut:
    """Records that a model hasn't seen, and what it says of them, each time asked once."""

    def __init__(self, model: nn.Module, sampler: Sampler, examples: Sequence[Example], task: Any) -> None:
        self.labels = likelihood_of(task).stacked([example["label"] for example in examples])
        self.weights = sampler.scalable
        self.averages = True  # draws, which are more than the mean
        self._inputs: Any = {"model": model, "inputs": examples, "task": task, "sampler": sampler}
        self._logits: dict[float, Tensor] = {}
        if self.weights is None:  # the model isn't needed any more
            draws = self._asked(_NUM_SAMPLES)
            self.averages = len(draws) > 1
            self._logits = {1.0: draws, 0.0: self._asked(0) if self.averages else draws}
            self._inputs = None

    def logits(self, width: float) -> Tensor:
        """Of each draw under a τ, (S, n, C); τ is 1, or 0 for the mean, where draws can't be scaled."""
        if width not in self._logits:
            assert self.weights is not None
            with _scaled(self.weights, width or 1.0):
                self._logits[width] = self._asked(_NUM_SAMPLES if width else 0)
        return self._logits[width]

    def predicted(self, scales: Scales, likelihood: Likelihood) -> dict[int, Prediction]:
        """What is predicted of the records under τ and T, by the mean and by draws; the keys are N."""
        mean = likelihood.normalized(self.logits(0.0) / scales.temperature_of_mean)
        draws = mean
        if scales.width != 0:
            draws = likelihood.normalized(self.logits(scales.width or 1.0) / scales.temperature)
        return {n: prediction_of(logits, n, likelihood) for n, logits in ((0, mean), (_NUM_SAMPLES, draws))}

    def _asked(self, num_samples: int) -> Tensor:
        return predict(**self._inputs, num_samples=num_samples).draw_logits()


def fit_scales(parts: Sequence[_HeldOut], likelihood: Likelihood = CATEGORICAL) -> tuple[Scales, dict[str, Any]]:
    """τ and T with the lowest NLL of the parts' records together, and what ``run.json`` says of them."""
    widths, scalable = _Widths(parts, likelihood), parts[0].weights is not None
    narrower, of_mean = widths.nll(0.0) < widths.nll(1.0), widths.tried[0.0].temperature
    if scalable:
        width, factor = 1.0, 0.5 if narrower else 2.0
        while 1 / _MOST < width < _MOST and widths.nll(width * factor) < widths.nll(width):
            width *= factor
    else:
        del widths.tried[0.0]
    if (near := widths.nearest().width) not in (0, 1):
        widths.nll(near * math.sqrt(2.0 if near < 1 else 0.5))
    taken, one = widths.nearest(), widths.tried[1.0]
    report = {
        "num_records": len(one.nll),
        "temperature": taken.temperature,
        "nll_before": one.nll_of_width.mean().item(),
        "nll_of_temperature_alone": one.nll.mean().item(),
        "nll": taken.nll.mean().item(),
    }
    if any(part.averages for part in parts):
        report["temperature_of_mean"] = of_mean
    if scalable:
        gain, error = widths.loss(one)
        report |= {
            "width": taken.width,
            "best_width": widths.best.width,
            "gain": gain,
            "gain_standard_error": error,
        }
    return Scales(taken.temperature, of_mean, taken.width if scalable else None), report


class _Widths:
    """What was found at each τ that was tried, with the T that is best there."""

    def __init__(self, parts: Sequence[_HeldOut], likelihood: Likelihood) -> None:
        self.parts, self.likelihood = parts, likelihood
        self.tried: dict[float, _Tried] = {}

    def nll(self, width: float) -> float:
        """The mean NLL at a τ."""
        if width not in self.tried:
            labels, logits = [part.labels for part in self.parts], [part.logits(width) for part in self.parts]
            temperature = fit_temperature(logits, labels, self.likelihood)
            nlls = (tempered_nll(logits, labels, value, self.likelihood) for value in (temperature, 1.0))
            self.tried[width] = _Tried(width, temperature, *nlls)
        return self.tried[width].nll.mean().item()

    @property
    def best(self) -> _Tried:
        """The one with the lowest NLL."""
        return min(self.tried.values(), key=lambda one: one.nll.mean())

    def loss(self, one: _Tried) -> tuple[float, float]:
        """How much worse than the best it is, and that mean's standard error."""
        differences = one.nll - self.best.nll
        count = len(differences)
        return differences.mean().item(), differences.std().item() / math.sqrt(count) if count > 1 else math.inf

    def nearest(self) -> _Tried:
        """Of those that can't be told from the best the nearest to τ = 1."""

        def is_good(one: _Tried) -> bool:
            mean, error = self.loss(one)
            return one is self.best or mean <= max(error, _NO_LOSS)

        good = filter(is_good, self.tried.values())
        return min(good, key=lambda one: abs(math.log(one.width)) if one.width else math.inf)


def saved_factor(folder: Path) -> float:
    """What a run's posterior was multiplied by after its training."""
    if not (folder / f"{_FILE}.json").is_file() or (width := read_state(folder, _FILE)[0]["width"]) is None:
        return 1.0
    return width or _NO_WIDTH


def folds(examples: Sequence[Example], count: int, seed: int = 0) -> list[list[int]]:
    """Positions in each of K folds of nearly equal sizes, with nearly equal counts of each label; rising.

    Copies of an example are in one fold.
    """
    generator = random.Random(seed)
    groups: dict[Any, list[list[int]]] = {}
    read = ({name: value for name, value in example.items() if name != ROW} for example in examples)
    for unit in grouped(range(len(examples)), first_copies(read)):
        label = examples[unit[0]]["label"]
        groups.setdefault(tuple(label) if isinstance(label, list) else label, []).append(unit)
    dealt = [unit for _, group in sorted(groups.items()) for unit in generator.sample(group, len(group))]
    return [sorted(position for unit in dealt[start::count] for position in unit) for start in range(count)]


@contextmanager
def _scaled(weights: ScalableWeights, factor: float) -> Iterator[None]:
    """Draws spread by another factor inside; then they are as they were, to the bit."""
    before = [whole(tensor.detach()).clone() for tensor in weights.spread()]
    try:
        weights.scale_(factor)
        yield
    finally:
        with torch.no_grad():
            for tensor, values in zip(weights.spread(), before, strict=True):
                put_(tensor, values)


def _copy(model: nn.Module) -> nn.Module:
    """A copy of a model in which the base's weights, but for those that are trained, are the same ones.

    Of several adapters all but one are frozen until it is their turn.
    """
    parts = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    named = [pair for part in parts for pair in part.named_parameters()]
    own = {parameter for name, parameter in named if not name.startswith(("base_layer.", "original_module."))}
    own |= {parameter for parameter in model.parameters() if parameter.requires_grad}
    frozen = [module for module in model.modules() if own.isdisjoint(module.parameters())]
    shared = [*frozen, *(parameter for parameter in model.parameters() if parameter not in own)]
    return copy.deepcopy(model, {id(part): part for part in shared})
