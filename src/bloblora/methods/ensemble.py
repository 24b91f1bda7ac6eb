r"""Deep ensemble of LoRAs (Lakshminarayanan et al., arXiv 1612.01474; for LoRA: Wang et al., arXiv 2310.00035).

.. math:: \bar p(y \mid x) = \frac1M \sum_{m=1}^M p(y \mid x, A_m, B_m)

The members differ in initialization, head and data order, and share one base model in memory. A draw is a member, in
their order: N above M gives M draws, N = 0 the first member. Training costs M times a LoRA's. M = 5 is as in the first
paper.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from .. import adapter
from ..checks import check_count
from ..contexts import changed, replaced
from ..models import draw_again
from ..prediction import Sampler
from .method import MEAN, Draw, Method, Training


@dataclass(kw_only=True)
class Ensemble(Method):
    """Several points."""

    members: int = field(default=5, metadata={"help": "How many LoRAs, M; training costs M times one."})

    name = "ensemble"
    paper = "1612.01474"
    starts_from_lora = False
    files = (*Method.files, *(f"member_*/{pattern}" for pattern in Method.files))

    def __post_init__(self) -> None:
        check_count("members", self.members, 2)

    @torch.no_grad()
    def prepare(self, base: PreTrainedModel, lora: LoraConfig) -> nn.Module:
        """The base with M fresh LoRAs, each with a head of its own where the task has one."""
        names = member_names(self.members)
        model = get_peft_model(base, lora, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, lora)
            parts = model.get_base_model().named_modules()
            # PEFT copies the first member's head.
            draw_again(base, {p: m.modules_to_save[name] for p, m in parts if isinstance(m, ModulesToSaveWrapper)})
        return model

    def fit(self, model: nn.Module, training: Training) -> Sampler:
        """Train one member after the other."""
        assert isinstance(model, PeftModel)
        seed = training.arguments["seed"]
        for number, name in enumerate(member_names(self.members)):
            model.set_adapter(name)
            set_seed(seed + number)
            training.run(model, part=name, seed=seed + number, **self.objective())
        return self.sampler(model)

    def objective(self) -> dict[str, Any]:
        """Options of `bloblora.training.Objective` that a member is trained with."""
        return {}

    def sampler(self, model: PeftModel) -> Sampler:
        """What draws the members."""
        return Members(model)

    def draws(self, model: PeftModel, sampler: Sampler, num_samples: int, seed: int) -> list[Draw]:
        """The first member for the mean, and the members in their order."""
        members = member_names(self.members)
        numbered = [Draw(f"draw_{number:02d}", member) for number, member in enumerate(members[:num_samples])]
        return [Draw(MEAN, members[0]), *numbered]

    def save(self, model: nn.Module, sampler: Sampler, folder: Path) -> None:
        """Write each member as a LoRA: the first in ``folder`` itself, the others in folders of their names."""
        assert isinstance(model, PeftModel)
        for number, name in enumerate(member_names(self.members)):
            adapter.save(model, folder / name if number else folder, name)

    def load(self, base: PreTrainedModel, folder: Path) -> tuple[nn.Module, Sampler]:
        """The members on one base."""
        first, *others = member_names(self.members)
        model = adapter.load(base, folder, first, checked=True)
        for name in others:
            adapter.load_beside(model, folder / name, name)
        return model.eval(), self.sampler(model)


class Members(Sampler):
    """The adapters of a model as draws."""

    def __init__(self, model: PeftModel) -> None:
        self._model = model

    def logits(self, forward: Callable[[], Tensor], num_samples: int, seed: int) -> Iterator[Tensor]:
        """Logits of the first N members, or of the first one with N = 0; the seed has no part in it."""
        for name in [*self._model.peft_config][: max(num_samples, 1)]:
            with active(self._model, name):
                logits = forward()
            yield logits


def active(model: PeftModel, adapter_name: str) -> AbstractContextManager[None]:
    """Another adapter is in force inside, in this context alone; the model's active adapter stays the same."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    return replaced({layer: changed(layer, _active_adapter=[adapter_name]) for layer in layers})


def member_names(members: int) -> list[str]:
    """The adapters of an ensemble."""
    return [f"member_{number}" for number in range(members)]
