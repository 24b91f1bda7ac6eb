"""Where draws come from: all that prediction needs to know of a method."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..adapter import UnevenPartsError
from ..adapter.head import GaussianHead, average_head
from .forward import BatchForward
from .states import with_states

DrawnLogits = tuple[Tensor, Tensor | None]
"""Logits (b, C) of a draw of an adapter, and, (b, 1 + C), the shares of their uncertainty that are epistemic because
they are the mean over a Gaussian head (`average_head`); None without such a head."""

Forward = Callable[[], Tensor]
"""The model on one batch: logits (b, C), a function of the weights that are in force."""


class Sampler(ABC):
    """A distribution over functions, of which a batch sees N."""

    @abstractmethod
    def logits(self, forward: Forward, num_samples: int, seed: int) -> Iterator[Tensor]:
        """Logits (b, C) of each of N draws; of the one best guess with ``num_samples`` 0.

        What is in force for a draw is in force while ``forward`` runs, in this context (`bloblora.contexts`), and not
        between the draws, when whoever takes them goes on.

        Draw s of a seed is one function: it depends neither on the batch nor on how many draws follow. A method with
        fewer functions than N yields those that it has.
        """

    def approximated(self, change: Callable[[WeightDraws], Sampler]) -> Sampler:
        """The same, but that its draws of the weights are changed; itself where it draws no weights."""
        return self

    @property
    def scalable(self) -> ScalableWeights | None:
        """What of it decides how far draws spread, where that can be scaled."""
        return None

    @property
    def is_point(self) -> bool:
        """Whether it is one function for any N, which one forward of the model gives."""
        return False


class WeightDistribution(Protocol):
    """A distribution over weights, such as `bloblora.adapter.Posterior`; what is in force is so in one context."""

    def draw(self, seed: torch.Generator) -> AbstractContextManager[None]:
        """The next draw of the weights is in force inside."""
        ...

    def mean(self) -> AbstractContextManager[None]:
        """The best guess of the weights is in force inside."""
        ...


@runtime_checkable
class StackedWeights(WeightDistribution, Protocol):
    """One of which several draws can be in force at once, such as `bloblora.adapter.Posterior`."""

    @property
    def head(self) -> GaussianHead | None:
        """The classification head that is drawn too, if one is."""
        ...

    @property
    def adapter_is_gaussian(self) -> bool:
        """Whether draws differ in more than the head."""
        ...

    def layer_names(self) -> Collection[str]:
        """The layers that draws change."""
        ...

    def sample(self, generator: torch.Generator) -> Any:
        """The weights of the next draw."""
        ...

    def without_head(self, weights: Any) -> Any:
        """The same draw with the mean of the head."""
        ...

    def stacked(self, samples: Sequence[Any], rows: int) -> AbstractContextManager[None]:
        """In this context each of as many equal parts of a batch of ``rows`` sees one draw, in order."""
        ...


@runtime_checkable
class MirroredWeights(StackedWeights, Protocol):
    """One whose draws lie symmetrically about a mean, such as `bloblora.adapter.Posterior`."""

    def mirror(self, weights: Any) -> Any:
        """The draw as far on the other side of the mean."""
        ...

    def fixed(self, weights: Any) -> AbstractContextManager[None]:
        """These weights are in force inside."""
        ...


@runtime_checkable
class ScalableWeights(Protocol):
    """A distribution over weights whose draws can spread less or more, such as `bloblora.adapter.Posterior`."""

    def spread(self) -> list[Tensor]:
        """The tensors that `scale_` changes."""
        ...

    def scale_(self, factor: float) -> None:
        """Multiply how far each draw is from the mean by a factor above 0, in place."""
        ...


class Point(Sampler):
    """One function: a model as it is."""

    def logits(self, forward: Forward, num_samples: int, seed: int) -> Iterator[Tensor]:
        """Logits of the model, the same for any N."""
        yield forward()

    @property
    def is_point(self) -> bool:
        """It is."""
        return True


@dataclass(frozen=True)
class WeightDraws(Sampler):
    r"""A forward under each draw of the weights; where the weights can be stacked, draws share forwards.

    A Gaussian head isn't drawn: given what it reads of an input, the mean over its draws is known (`average_head`).
    Each draw of the adapter has that mean, and where nothing but the head is Gaussian there is one draw for any N.

    Attributes:
        weights: where the draws come from.
        mirrored: make draws in pairs M + E∘Ω and M − E∘Ω (antithetic variates, Hammersley & Morton 1956). Each is a
            draw of the same distribution, and what is odd in E cancels in the average of a pair: two draws average
            like several independent ones. Draws 2s and 2s + 1 aren't independent, so spreads between draws are those of
            pairs.

    Raises:
        ValueError: ``mirrored``, and the weights have no mean to mirror at.
    """

    weights: WeightDistribution
    mirrored: bool = False

    def __post_init__(self) -> None:
        if self.mirrored and not isinstance(self.weights, MirroredWeights):
            raise ValueError(f"mirrored: {type(self.weights).__name__} has no `mirror`; a posterior over LoRA has")

    def logits(self, forward: Forward, num_samples: int, seed: int) -> Iterator[Tensor]:
        """Logits of N draws, or of the mean."""
        generator = torch.Generator().manual_seed(seed)
        batch = forward if isinstance(forward, BatchForward) else None
        if batch and isinstance(self.weights, StackedWeights):
            batch.share_trunk(self.weights.layer_names())
        if num_samples == 0:
            with self.weights.mean():
                logits = forward()
            yield logits
        elif batch and isinstance(self.weights, StackedWeights):
            count = num_samples if self.weights.adapter_is_gaussian else 1
            yield from noted(batch, _together(self.weights, batch, count, self._samples(generator)))
        elif isinstance(self.weights, MirroredWeights):
            count = num_samples if self.weights.adapter_is_gaussian else 1
            for sample in islice(self._samples(generator), count):
                yield draw_together(self.weights, forward, [sample])[0][0]
        else:
            for _ in range(num_samples):
                with self.weights.draw(generator):
                    logits = forward()
                yield logits

    def approximated(self, change: Callable[[WeightDraws], Sampler]) -> Sampler:
        """What ``change`` makes of it."""
        return change(self)

    @property
    def scalable(self) -> ScalableWeights | None:
        """The weights."""
        return self.weights if isinstance(self.weights, ScalableWeights) else None

    def _samples(self, generator: torch.Generator) -> Iterator[Any]:
        """The weights of one draw after the other."""
        assert isinstance(self.weights, StackedWeights)
        while True:
            sample = self.weights.sample(generator)
            yield sample
            if self.mirrored:
                assert isinstance(self.weights, MirroredWeights)
                yield self.weights.mirror(sample)


@dataclass(frozen=True)
class Tempered(Sampler):
    """Another sampler's logits divided by a temperature (Guo et al., arXiv 1706.04599).

    Attributes:
        sampler: the other.
        temperature: of draws.
        temperature_of_mean: of the best guess alone, which is surer than an average of draws.
        width: τ, by which the draws' spread has been multiplied; None where it can't be. Under 0 no draw differs from
            the best guess, which is then made once for any N.
    """

    sampler: Sampler
    temperature: float
    temperature_of_mean: float
    width: float | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "temperature_of_mean"):
            if not (isinstance(value := getattr(self, name), float) and 0 < value < math.inf):
                raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
        if not (self.width is None or (isinstance(self.width, float) and 0 <= self.width < math.inf)):
            raise ValueError(f"width must be a finite number of at least 0, got {self.width!r}")

    def logits(self, forward: Forward, num_samples: int, seed: int) -> Iterator[Tensor]:
        """Logits of each draw, or of the best guess, over its T."""
        if self.width == 0:
            num_samples = 0
        temperature = self.temperature if num_samples else self.temperature_of_mean
        for logits in self.sampler.logits(forward, num_samples, seed):
            yield logits / temperature

    def of_new_head(self) -> Tempered:
        """With a new head, whose best guess needs no temperature: that of draws stays what it was beside that one."""
        return replace(self, temperature=self.temperature / self.temperature_of_mean, temperature_of_mean=1.0)

    def approximated(self, change: Callable[[WeightDraws], Sampler]) -> Sampler:
        """The other sampler's, under the same temperatures."""
        return replace(self, sampler=self.sampler.approximated(change))

    @property
    def scalable(self) -> ScalableWeights | None:
        """The other sampler's."""
        return self.sampler.scalable

    @property
    def is_point(self) -> bool:
        """Whether the other is, or its draws have no width."""
        return self.width == 0 or self.sampler.is_point


def _together(
    weights: StackedWeights, forward: BatchForward, num_samples: int, draws: Iterator[Any]
) -> Iterator[DrawnLogits]:
    """What each draw gives, several draws a forward and several forwards at a time."""

    def run(samples: Sequence[Any]) -> list[DrawnLogits]:
        return _stacked(weights, forward, samples)

    left, even = num_samples, True
    while left:
        sizes = forward.wave(left) if even else [1] * len(forward.wave(left))
        samples = [[*islice(draws, size)] for size in sizes]
        left -= sum(sizes)
        try:
            results = _side_by_side(run, samples)
        except UnevenPartsError:
            even = False
            results = _side_by_side(run, [[sample] for group in samples for sample in group])
        for drawn in results:
            yield from drawn


def draw_together(weights: MirroredWeights, forward: Forward, samples: Sequence[Any]) -> list[DrawnLogits]:
    """What each of some draws gives, in one forward where that is possible."""
    if isinstance(forward, BatchForward):
        try:
            return _stacked(weights, forward, samples)
        except UnevenPartsError:
            pass
    found = []
    for sample in samples:
        with weights.fixed(weights.without_head(sample)):
            found.append(_over_head(weights, forward))
    return found


def noted(forward: Forward, drawn: Iterable[DrawnLogits]) -> Iterator[Tensor]:
    """The logits of each draw; of a batch its forward is told the shares."""
    for logits, share in drawn:
        if share is not None and isinstance(forward, BatchForward):
            forward.head_shares.append(share)
        yield logits


def _over_head(weights: StackedWeights, forward: Forward) -> DrawnLogits:
    """Of one draw of an adapter that is in force."""
    if weights.head is None:
        return forward(), None
    logits, read = with_states(weights.head, forward)
    return (logits, None) if read is None else average_head(weights.head, logits, read)


@torch.no_grad()  # which a thread doesn't inherit
def _stacked(weights: StackedWeights, forward: BatchForward, samples: Sequence[Any]) -> list[DrawnLogits]:
    """Of S draws in one forward."""
    count = len(samples)
    with weights.stacked([weights.without_head(sample) for sample in samples], count * forward.rows):
        logits, share = _over_head(weights, partial(forward, count))
    shares = [None] * count if share is None else share.unflatten(0, (count, -1))
    return [*zip(logits.unflatten(0, (count, -1)), shares, strict=True)]


def _side_by_side(run: Callable[[Any], list[DrawnLogits]], groups: Sequence[Any]) -> list[list[DrawnLogits]]:
    if len(groups) == 1:
        return [run(groups[0])]
    pool = _pool(len(groups), max(1, torch.get_num_threads() // len(groups)))
    return [future.result() for future in [pool.submit(copy_context().run, run, group) for group in groups]]


@cache
def _pool(workers: int, threads: int) -> ThreadPoolExecutor:
    """Workers that share the cores; kept, for libraries hold memory for each thread that they have seen."""
    return ThreadPoolExecutor(workers, "draws", initializer=torch.set_num_threads, initargs=(threads,))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads
