r"""BLoB as a LoRA variant: what PEFT calls in place of the adapter's own part of a layer's forward.

.. math:: y = W_0 x + s\, B (A x), \qquad A \sim q(A)

One forward serves every Linear kind of PEFT that asks its variants (plain, Conv1D, 8-bit, 4-bit, GPTQ, HQQ, torchao).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.other import transpose
from torch import Tensor, nn
from transformers import PretrainedConfig

from .. import posterior as q
from ..contexts import state_of
from .batch import Batch
from .config import BlobConfig
from .watch import KlWatch

STD_PARAMETER = "blob_std_parameter_"
"""Layer attributes that hold the unconstrained Ω of each adapter, by adapter name: this and the factor's letter.
``adapter_model.safetensors``, a stock LoRA of the mean, is kept free of them."""


HEAD = "weight"
"""The factor of a head, as A and B are those of a LoRA layer."""

PRIOR_MEAN, PRIOR_STD = "blob_prior_mean_", "blob_prior_std_"
"""Likewise, where a prior has them for each entry: its mean μ and its standard deviation s. They are buffers and in no
``state_dict``."""


class UnevenPartsError(RuntimeError):
    """A layer whose input isn't the batch row by row, such as an expert's, can't give each part its own draw."""


@dataclass(frozen=True)
class Drawn:
    """What is in force for one layer: no fresh noise, and a draw or several.

    Attributes:
        weights: A (r, n), B (m, r) or a head's weight (C, d), by factor; one that isn't there has its mean. Where
            ``rows`` is given there are several, such as A (S, r, n): the s-th of S equal parts of a batch sees the
            s-th.
        rows: S·b, of the batch.
    """

    weights: Mapping[str, Tensor]
    rows: int | None = None


def mean_of(module: Any, adapter_name: str, factor: str) -> nn.Parameter:
    """The posterior's mean M: LoRA's own A (r, n) or B (m, r) of a layer, or the weight (C, d) of a head."""
    return module.weight if factor == HEAD else getattr(module, f"lora_{factor}")[adapter_name].weight


class Gaussian:
    """The posterior of the factors of one module; an instance belongs to one module and one adapter.

    Attributes:
        config: the adapter's configuration.
        factors: A, B, or the weight of a head.
        kept: of a copy that was made inside a draw, that draw, which it stays; None otherwise.
        prior_at_start: whether the prior's mean is the factor's value at `init`.
        watch: of the first module of an adapter, whose forwards stand for all; None otherwise.
        temperatures: of the first module, `Posterior.temperatures`.

    Args:
        config: the adapter's configuration.
        batch: of the model.
        routed: whether the module is an expert's, which sees some tokens of the batch.
    """

    def __init__(self, config: BlobConfig, batch: Batch, routed: bool = False) -> None:
        self.config = config
        self.factors = config.gaussian_factors
        self.batch, self.routed = batch, routed
        self.kept: Drawn | None = None
        self.prior_at_start = config.prior_mean == "start"
        self.watch: KlWatch | None = None
        self.temperatures: tuple[float, float] | None = None
        self._located = False  # faster than to look for buffers that aren't there

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: torch copies no tensor that has a gradient's history, as a draw has."""
        if (drawn := self.drawn) is not None and drawn.rows is None:
            weights = {factor: weight.detach() for factor, weight in drawn.weights.items()}
            return self.__dict__ | {"kept": Drawn(weights)}
        return self.__dict__

    @property
    def drawn(self) -> Drawn | None:
        """What is in force in this context; None where a forward in train mode draws fresh noise."""
        drawn: Drawn | None = state_of(self)
        return self.kept if drawn is None else drawn

    def init(self, module: Any, adapter_name: str, **_: Any) -> None:
        """Give the module a fresh Ω parameter for each Gaussian factor, of the factor's shape, and its prior."""
        for factor in self.factors:
            name = STD_PARAMETER + factor
            if not hasattr(module, name):
                setattr(module, name, nn.ParameterDict())
                if isinstance(module, LoraLayer):
                    module.adapter_layer_names = (*module.adapter_layer_names, name)
            mean = mean_of(module, adapter_name, factor)
            width = self._prior_width(mean, factor)
            if self.prior_at_start or width != self._usual_width:
                prior_mean = mean if self.prior_at_start else torch.zeros(())
                self.set_prior(module, adapter_name, factor, prior_mean, torch.tensor(width))
            # Of a head that a process of FSDP gets from the first: accelerate tells parameters apart by where they lie.
            like = torch.empty(mean.shape, dtype=mean.dtype) if mean.is_meta else mean
            parameter = q.init_std_parameter(like, self.config.start_std(width), self.config.std_parameterization)
            getattr(module, name)[adapter_name] = nn.Parameter(parameter, requires_grad=mean.requires_grad)

    @property
    def _usual_width(self) -> float | str:
        """Standard deviation of the prior of a factor that keeps none of its own."""
        return self.config.prior_std

    def _prior_width(self, mean: Tensor, factor: str) -> float:
        """Standard deviation of the prior of a factor."""
        given = self.config.prior_std
        return _start_std(mean, factor) if isinstance(given, str) else given

    def std_parameter(self, module: Any, adapter_name: str, factor: str) -> nn.Parameter:
        """The unconstrained parameter of Ω, of the factor's shape."""
        return getattr(module, STD_PARAMETER + factor)[adapter_name]

    def prior_of(self, module: Any, adapter_name: str, factor: str) -> tuple[Tensor, Tensor] | None:
        """μ and s of the prior, of the factor's shape; None where all entries of the model have one prior."""
        if not self._located:
            return None
        return getattr(module, PRIOR_MEAN + factor)[adapter_name], getattr(module, PRIOR_STD + factor)[adapter_name]

    @torch.no_grad()
    def set_prior(self, module: Any, adapter_name: str, factor: str, mean: Tensor, std: Tensor) -> None:
        """Keep copies of μ and s, of the factor's shape or one number for all of it."""
        like, self._located = mean_of(module, adapter_name, factor), True
        dtype = torch.promote_types(like.dtype, torch.float32)
        for name, values in ((PRIOR_MEAN + factor, mean), (PRIOR_STD + factor, std)):
            if not hasattr(module, name):
                setattr(module, name, BufferDict(persistent=False))
                if isinstance(module, LoraLayer):
                    module.other_param_names = (*module.other_param_names, name)
            getattr(module, name)[adapter_name] = torch.empty(like.shape, dtype=dtype, device=like.device).copy_(values)

    def remove(self, module: Any, adapter_name: str) -> None:
        """Take what `init` gave the module away again."""
        for factor in self.factors:
            for name in (STD_PARAMETER, PRIOR_MEAN, PRIOR_STD):
                if adapter_name in (tensors := getattr(module, name + factor, {})):
                    del tensors[adapter_name]

    def product(
        self, factor: str, module: Any, adapter_name: str, x: Tensor, rows: Tensor | slice = slice(None)
    ) -> Tensor:
        """x times a factor's transpose in the current mode: the fixed draw, fresh noise (train mode), or the mean."""
        drawn = self.drawn
        if drawn is not None and (weight := drawn.weights.get(factor)) is not None:
            if drawn.rows is not None:
                return _linear_of_parts(x, weight[:, rows].to(x.dtype), drawn.rows)
            return F.linear(x, weight[rows].to(x.dtype))
        mean = mean_of(module, adapter_name, factor)[rows]
        if factor not in self.factors or drawn is not None or not module.training:
            return F.linear(x, mean)
        parameter = self.std_parameter(module, adapter_name, factor)
        if self.watch is not None and parameter.requires_grad and not torch.compiler.is_compiling():
            self.watch.trained(parameter)
        std = q.std(parameter[rows], self.config.std_parameterization)
        parts = self.batch.parts(x, self.routed)
        squares = self.batch.squares_of(x, parts) if self.config.fisher(self.batch.expects_labels) else None
        return q.project(x, mean, std, self.config.estimator, parts, squares)


class BlobVariant(Gaussian, LoraVariant):
    """The posterior of one LoRA layer.

    Attributes:
        tied_config: the model's config where this layer's base weight is also the embedding; None otherwise.
    """

    def __init__(self, config: BlobConfig, batch: Batch, routed: bool = False) -> None:
        super().__init__(config, batch, routed)
        self.tied_config: PretrainedConfig | None = None
        self._merged: tuple[Tensor, Tensor] | None = None

    def init(self, module: Any, adapter_name: str, **options: Any) -> None:  # type: ignore[override]
        """As `Gaussian.init`."""
        super().init(module, adapter_name, **options)
        if type(module).__name__ == "TorchaoLoraLinear":  # whose merge, unlike the others', asks no variant
            module.merge, module.get_delta_weight = partial(_merge, module), partial(_delta_weight, module)

    def remove(self, module: Any, adapter_name: str) -> None:
        """As `Gaussian.remove`."""
        super().remove(module, adapter_name)
        del module.lora_variant[adapter_name]
        if not module.lora_variant:
            for name in ("merge", "get_delta_weight"):
                vars(module).pop(name, None)

    def project(self, module: Any, adapter_name: str, x: Tensor) -> Tensor:
        """A x in the current mode: the fixed draw, fresh noise (train mode), or the mean; (..., n) → (..., r)."""
        return self.product("A", module, adapter_name, module.lora_dropout[adapter_name](x))

    def expand(self, module: Any, adapter_name: str, h: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """B h in the current mode, of all outputs or of some rows; (..., r) → (..., rows)."""
        if isinstance(rows, slice) and "B" not in self.factors:
            return module.lora_B[adapter_name](h)
        bias = module.lora_B[adapter_name].bias
        product = self.product("B", module, adapter_name, h, rows)
        return product if bias is None else product + bias[rows]

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        """``result`` + s·B(A x); shapes as ``result``."""
        x = x.to(mean_of(module, active_adapter, "A").dtype)
        h = self.project(module, active_adapter, x)
        scaling = module.scaling[active_adapter]
        if module.lora_B[active_adapter].bias is None:
            # s B h = B (s h), and in place: two passes over (..., m) less than in plain LoRA, which pay for the noise
            return self.expand(module, active_adapter, h * scaling).to(result.dtype).add_(result)
        return result + (self.expand(module, active_adapter, h) * scaling).to(result.dtype)

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        """``orig_weight`` plus the delta of the fixed draw, or of the mean; a new tensor.

        A weight that is tied to the embedding is untied first: merging must not change the embedding.
        """
        if self.tied_config is not None:
            base = module.get_base_layer()
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
            self.tied_config.tie_word_embeddings, self.tied_config = False, None
        self._keep(module, active_adapter)
        return orig_weight + self._delta(module, active_adapter, orig_weight)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:  # type: ignore[override]
        """The same, in place."""
        merged = self.merge_safe(module, active_adapter, orig_weight.data)
        module.get_base_layer().weight.data = merged

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        """``orig_weight`` less the delta that was merged, even when another draw is in force by now."""
        return orig_weight.data - self._delta(module, active_adapter, orig_weight)

    def _keep(self, module: Any, adapter_name: str) -> None:
        """What a merge adds, for its end: another draw may be in force then."""
        weights = {} if self.drawn is None else self.drawn.weights
        a, b = (weights.get(factor, mean_of(module, adapter_name, factor)) for factor in "AB")
        self._merged = (a.detach().clone(), b.detach().clone())

    @torch.no_grad()
    def _delta(self, module: Any, adapter_name: str, like: Tensor) -> Tensor:
        assert self._merged is not None
        a, b = self._merged
        delta = b.float() @ a.float() * module.scaling[adapter_name]
        delta = transpose(delta, getattr(module, "fan_in_fan_out", False))
        return delta.to(device=like.device, dtype=like.dtype)


def _merge(module: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """A layer's own merge, of the draws in force."""
    for name in check_adapters_to_merge(module, adapter_names):
        if isinstance(variant := module.lora_variant.get(name), BlobVariant):
            variant._keep(module, name)
    type(module).merge(module, safe_merge, adapter_names)


def _delta_weight(module: Any, adapter_name: str) -> Tensor:
    """What a merge adds to a weight, and its end takes away: of a Gaussian what was last merged, or its mean."""
    variant = module.lora_variant.get(adapter_name)
    if not isinstance(variant, BlobVariant) or variant._merged is None:
        return type(module).get_delta_weight(module, adapter_name)
    return variant._delta(module, adapter_name, mean_of(module, adapter_name, "A"))


def _start_std(mean: Tensor, factor: str) -> float:
    """Width of a prior as wide as LoRA's start of A; of B, which starts at 0, as that of an A with its r inputs."""
    default = 1 / math.sqrt(3 * mean.shape[1])  # Kaiming uniform's with a = √5, PEFT's
    return default if factor == "B" else mean.detach().float().square().mean().sqrt().item() or default


def _linear_of_parts(x: Tensor, weights: Tensor, rows: int) -> Tensor:
    """x (S·b, ..., n) times the transpose of its part's weight (S, m, n), (S·b, ..., m)."""
    if len(weights) == 1:
        return F.linear(x, weights[0])
    if x.shape[0] != rows:
        raise UnevenPartsError(f"an input has {x.shape[0]} rows, the batch {rows}")
    parts = x.reshape(len(weights), -1, x.shape[-1])
    return torch.bmm(parts, weights.mT).reshape(*x.shape[:-1], -1)
