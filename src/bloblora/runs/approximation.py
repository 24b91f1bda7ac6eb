"""Predictions that cost less than a forward a draw, by name; docs/cost.md says what each loses."""

import os
from dataclasses import dataclass, replace

from ..adapter import Posterior
from ..methods import Method, Temperature
from ..methods.gaussian import GaussianMethod
from ..prediction import Linearized, Sampler, StoppingRule, Tempered, TopBlocks, WeightDraws
from .config import RunError
from .folder import open_run

_FORMS = "'mirrored', 'linearized', 'top-blocks:K', or 'stop' or 'mirrored-stop', with or without ':ERROR:TOLERANCE'"
_LOOKS = {"stop": StoppingRule.looks, "mirrored-stop": (2, 4, 6)}  # pairs stay whole


@dataclass(frozen=True)
class Approximation:
    """One of them: `mirrored`, `linearized`, `top-blocks`, `stop` or `mirrored-stop`.

    Attributes:
        name: as given.
        kind: the part before a colon.
        blocks: of `TopBlocks`.
        stop: the rule of ``stop`` and ``mirrored-stop``; None for the others.
    """

    name: str
    kind: str
    blocks: int = 0
    stop: StoppingRule | None = None

    @classmethod
    def parse(cls, name: str) -> "Approximation":
        """The approximation of a name, as ``--approximate`` takes it.

        Raises:
            RunError: there is none.
        """
        kind, *values = name.split(":")
        try:
            if kind in ("mirrored", "linearized") and not values:
                return cls(name, kind)
            if kind == "top-blocks" and len(values) == 1 and int(values[0]) > 0:
                return cls(name, kind, blocks=int(values[0]))
            if kind in _LOOKS and len(values) in (0, 2):
                error, tolerance = map(float, values or (StoppingRule.error, StoppingRule.tolerance))
                return cls(name, kind, stop=StoppingRule(error, tolerance, _LOOKS[kind]))
        except ValueError as problem:
            raise RunError(f"approximate: {name!r}: {problem}") from problem
        raise RunError(f"approximate: {name!r}; it must be {_FORMS}")

    def check(self, method: Method) -> None:
        """Raise a RunError where a method's draws don't allow it: known before a model is loaded."""
        inner = method.inner if isinstance(method, Temperature) else method
        if self.kind != "stop" and not isinstance(inner, GaussianMethod):
            raise RunError(f"approximate {self.name!r} needs a Gaussian over LoRA, which method {inner.name!r} has not")

    def apply(self, sampler: Sampler) -> Sampler:
        """The sampler that approximates another one; ``stop`` leaves it as it is."""
        if isinstance(sampler, Tempered):
            return replace(sampler, sampler=self.apply(sampler.sampler))
        if self.kind == "stop":
            return sampler
        assert isinstance(sampler, WeightDraws)
        posterior = sampler.weights
        assert isinstance(posterior, Posterior)
        if self.kind == "linearized":
            return Linearized(posterior)
        if self.kind == "top-blocks":
            return WeightDraws(TopBlocks(posterior, self.blocks))
        return WeightDraws(posterior, mirrored=True)


def check_approximation(directory: str | os.PathLike[str], approximate: str | None) -> None:
    """Raise a RunError where a run can't be approximated so; no model is loaded."""
    if approximate is not None:
        Approximation.parse(approximate).check(open_run(directory).method)
