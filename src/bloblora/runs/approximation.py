"""Predictions that cost less than a forward a draw, by name; docs/cost.md says what each loses."""

from dataclasses import dataclass

from ..adapter import Posterior
from ..messages import quoted
from ..methods import Method
from ..prediction import Linearized, Prediction, Sampler, StoppingRule, TopBlocks, WeightDraws
from ..tasks import Task
from .config import RunError

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
            raise RunError(f"approximate: {quoted(name)}: {problem}") from problem
        raise RunError(f"approximate: {quoted(name)}; it must be {_FORMS}")

    def check(self, method: Method, task: Task) -> None:
        """Raise a RunError where a method's draws or a task don't allow it: known before a model is loaded."""
        if task.family.name != Prediction.kind and (self.stop or self.kind == "linearized"):
            raise RunError(f"approximate {self.name!r} is for classes and choices; the run's task is {task.name}")
        if self.kind != "stop" and not method.gaussian:
            raise RunError(f"approximate {self.name!r} needs a Gaussian over LoRA; method {method.name!r} has none")

    def apply(self, sampler: Sampler) -> Sampler:
        """The sampler that approximates another one; ``stop`` leaves it as it is."""
        return sampler if self.kind == "stop" else sampler.approximated(self._of_draws)

    def _of_draws(self, draws: WeightDraws) -> Sampler:
        posterior = draws.weights
        assert isinstance(posterior, Posterior)
        if self.kind == "linearized":
            return Linearized(posterior)
        if self.kind == "top-blocks":
            return WeightDraws(TopBlocks(posterior, self.blocks))
        return WeightDraws(posterior, mirrored=True)
