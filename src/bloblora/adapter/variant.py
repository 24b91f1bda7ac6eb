r"""BLoB as a LoRA variant: what PEFT calls in place of the adapter's own part of a layer's forward.

.. math:: y = W_0 x + s\, B (A x), \qquad A \sim q(A)

One forward serves every Linear kind of PEFT that asks its variants (plain, Conv1D, 8-bit, 4-bit, GPTQ, HQQ).
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraVariant
from peft.utils.other import transpose
from torch import Tensor, nn
from transformers import PretrainedConfig

from .. import posterior as q
from .config import BlobConfig

STD_PARAMETER = "blob_std_parameter"
"""Layer attribute that holds the unconstrained Ω of each adapter, by adapter name. `bloblora.save` and the trainer's
checkpoints keep it out of ``adapter_model.safetensors``, which stays a stock LoRA of the mean; PEFT's own
``save_pretrained`` doesn't."""


def lora_a(module: Any, adapter_name: str) -> nn.Parameter:
    """LoRA's A of a layer, (r, n): the posterior's mean M."""
    return module.lora_A[adapter_name].weight


class BlobVariant(LoraVariant):
    """The posterior of one layer's A; an instance belongs to one layer and one adapter.

    Attributes:
        config: the adapter's configuration.
        weight: A (r, n) that every forward uses while set: a fixed draw; None otherwise.
        sampling: whether a forward draws fresh noise in train mode.
        tied_config: the model's config where this layer's base weight is also the embedding; None otherwise.
    """

    def __init__(self, config: BlobConfig) -> None:
        self.config = config
        self.weight: Tensor | None = None
        self.sampling = True
        self.tied_config: PretrainedConfig | None = None
        self._merged: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: torch copies no tensor that has a gradient's history, as a draw has."""
        return self.__dict__ | {"weight": None if self.weight is None else self.weight.detach()}

    def init(self, module: Any, adapter_name: str, std_parameter: Tensor | None = None, **_: Any) -> None:  # type: ignore[override]
        """Give the layer its Ω parameter (r, n): the one passed, or a fresh start."""
        if not hasattr(module, STD_PARAMETER):
            setattr(module, STD_PARAMETER, nn.ParameterDict())
            module.adapter_layer_names = (*module.adapter_layer_names, STD_PARAMETER)
        mean = lora_a(module, adapter_name)
        if std_parameter is None:
            std_parameter = q.init_std_parameter(mean, self.config.init_std, self.config.std_parameterization)
        getattr(module, STD_PARAMETER)[adapter_name] = nn.Parameter(
            std_parameter.to(mean.device), requires_grad=mean.requires_grad
        )

    def std(self, module: Any, adapter_name: str) -> Tensor:
        """Ω, (r, n)."""
        return q.std(getattr(module, STD_PARAMETER)[adapter_name], self.config.std_parameterization)

    def project(self, module: Any, adapter_name: str, x: Tensor) -> Tensor:
        """A x in the current mode: the fixed draw, fresh noise (train mode), or the mean; (..., n) → (..., r)."""
        x = module.lora_dropout[adapter_name](x)
        mean = lora_a(module, adapter_name)
        if self.weight is not None:
            return F.linear(x, self.weight.to(x.dtype))
        if not (self.sampling and module.training):
            return F.linear(x, mean)
        return q.project(x, mean, self.std(module, adapter_name), self.config.estimator)

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        """``result`` + s·B(A x); shapes as ``result``."""
        x = x.to(lora_a(module, active_adapter).dtype)
        h = self.project(module, active_adapter, x)
        return result + (module.lora_B[active_adapter](h) * module.scaling[active_adapter]).to(result.dtype)

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        """``orig_weight`` plus the delta of the fixed draw, or of the mean; a new tensor.

        A weight that is tied to the embedding is untied first: merging must not change the embedding.
        """
        if self.tied_config is not None:
            base = module.get_base_layer()
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
            self.tied_config.tie_word_embeddings, self.tied_config = False, None
        weight = lora_a(module, active_adapter) if self.weight is None else self.weight
        self._merged = weight.detach().clone()
        return orig_weight + self._delta(module, active_adapter, orig_weight)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:  # type: ignore[override]
        """The same, in place."""
        merged = self.merge_safe(module, active_adapter, orig_weight.data)
        module.get_base_layer().weight.data = merged

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        """``orig_weight`` less the delta that was merged, even when another draw is in force by now."""
        return orig_weight.data - self._delta(module, active_adapter, orig_weight)

    @torch.no_grad()
    def _delta(self, module: Any, adapter_name: str, like: Tensor) -> Tensor:
        assert self._merged is not None
        delta = module.lora_B[adapter_name].weight.float() @ self._merged.float()
        delta = transpose(delta * module.scaling[adapter_name], getattr(module, "fan_in_fan_out", False))
        return delta.to(device=like.device, dtype=like.dtype)
