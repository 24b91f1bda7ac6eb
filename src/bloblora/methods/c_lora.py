r"""C-LoRA (Rahmati et al., arXiv 2505.17773): a Gaussian over an r×r matrix between B and A, given by the input.

With h = A x of a token, and G(h) the sigmoid of the network's second half,

.. math:: \Delta W = s\,B\,E\,A, \qquad E_{ij} = \mu_{ij}(h) + \Omega_{ij}(h)\,\epsilon_{ij}, \quad
          \epsilon \sim \mathcal N(0, I), \qquad (\mu, \Omega = G \circ G) = \mathrm{network}(h)

.. math:: \min\ \frac1b \sum_k \mathrm{NLL}_k + \frac{\lambda}{D}\, \frac1{T} \sum_t
          \mathrm{KL}\big(\mathcal N(\mu(h_t), \Omega(h_t)^2)\ \|\ \mathcal N(0, \sigma_p^2)\big)

A, B and the networks are points. Network, start and σp are those of the published code (github.com/ahra99/c_lora,
modelwrappers/c_lora.py): two linear layers with 64 ReLU between them. Three things differ from it:

- ε is one draw for all tokens of an example, and at prediction for all inputs, so that a draw is a function; theirs is
  fresh for every token, with flipout's signs on top.
- The KL is the mean over the tokens of a batch, without padding, and weighs 1/D. Where a network ignores its input, E
  is one random matrix and the objective its ELBO. Otherwise it is none: the KL between distributions over functions is
  at least that of each single token. Theirs is the sum over tokens, padding and examples times 10⁻⁶/65, with BLoB's
  weights of batches.
- One AdamW step on the sum; their networks take an SGD step on both terms as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import posterior as q
from ..adapter.batch import Batch, follow, is_routed
from ..adapter.bayesianize import check_layers
from ..checks import check_count, check_positive
from ..contexts import in_context, state_of
from ..prediction import Sampler, WeightDraws
from ..training import BlobTrainer
from .method import PRIOR_IN_LOSS, Method, Training, load_added

_NETWORK = "c_lora_network"


@dataclass(kw_only=True)
class CLora(Method):
    """A Gaussian over r×r matrices whose mean and width depend on the input."""

    prior_std: float = field(
        default=0.2, metadata={"help": "σp of the prior N(0, σp²) on each entry of E.", "search": (0.03, 1.0)}
    )
    kl_scale: float = field(
        default=1.0,
        metadata={"help": "λ, which multiplies the KL; lower trusts the data more.", "search": (0.01, 10.0)},
    )
    network_width: int = field(default=64, metadata={"help": "Hidden units of each layer's network."})

    name = "c-lora"
    paper = "2505.17773"
    training_defaults = PRIOR_IN_LOSS
    starts_from_lora = False

    def __post_init__(self) -> None:
        check_positive(self, "prior_std")
        check_positive(self, "kl_scale", or_zero=True)
        check_count("network_width", self.network_width, 1)

    def check_run(self, lora: Mapping[str, Any], training: Mapping[str, Any]) -> None:
        """Raises: activations are computed again in the backward, where no KL is collected."""
        for name in ("gradient_checkpointing", "activation_checkpointing"):
            if training.get(name):
                raise ValueError(f"{name} isn't for method {self.name!r}, whose KL is of activations; leave it out")

    def check_draws(self, num_samples: int) -> None:
        """Raises: ΔW depends on the input."""
        raise ValueError(
            f"method {self.name!r}: its ΔW depends on the input, which no adapter of other programs does; export a run "
            "of another method"
        )

    def prepare(self, base: PreTrainedModel, lora: LoraConfig) -> nn.Module:
        """The base with a fresh LoRA and networks; a ValueError where a layer can't have one."""
        model = super().prepare(base, lora)
        self._add_networks(model)
        return model

    def fit(self, model: nn.Module, training: Training) -> Sampler:
        """Train on the NLL and the weighted KL."""
        variants, task = _variants(model), training.own_task
        pad, prior_std = getattr(task, "pad_token_id", None), self.prior_std
        weight = self.kl_scale / len(training.examples)

        class Trainer(BlobTrainer):
            def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
                if not model.training:
                    return super().compute_loss(model, inputs, *args, **kwargs)
                collected = _Kl(prior_std, None if pad is None else inputs["input_ids"] != pad)
                for variant in variants.values():
                    variant.kl = collected
                nll = super().compute_loss(model, inputs, *args, **kwargs)
                return self.with_penalty(nll, weight * collected.total.to(nll) / self.args.num_weight_draws)

        training.run(model, trainer=Trainer)
        for variant in variants.values():
            variant.kl = None
        return WeightDraws(ContextualNoise(model))

    def load(self, base: PreTrainedModel, folder: Path) -> tuple[nn.Module, Sampler]:
        """The LoRA with its networks, which PEFT saves as parts of its layers."""
        model, _ = super().load(base, folder)
        self._add_networks(model)
        return load_added(model, self.weights_file(folder)), WeightDraws(ContextualNoise(model))

    def _add_networks(self, model: nn.Module) -> None:
        assert isinstance(model, PeftModel)
        batch = follow(model.get_base_model())
        for name, layer in check_layers(model, "default").items():
            layer.lora_variant["default"] = _ContextualVariant(layer, self.network_width, batch, is_routed(name))


@dataclass
class _Kl:
    """The KL of one training step, a sum over layers of means over tokens; ``valid`` (b, T) is what isn't padding."""

    prior_std: float
    valid: Tensor | None
    total: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, mean: Tensor, root: Tensor) -> None:
        """Add a layer's, of μ and G, (b, ..., r, r)."""
        if self.valid is not None and mean.shape[:-2] == self.valid.shape:  # a head may see a part of the tokens
            mean, root = mean[self.valid], root[self.valid]
        kl = q.kl_divergence([mean], [root], self.prior_std, "square") / mean.shape[:-2].numel()
        self.total = self.total.to(kl) + kl


class _ContextualVariant(LoraVariant):
    """y = W₀x + s·B (E (A x)); one layer's, one adapter's.

    A forward uses the ε (r, r) that is in force in its context; without one it draws one an example in train mode, and
    uses μ alone in eval mode.

    Attributes:
        r: of the layer.
        kl: where training forwards add their KL.
    """

    def __init__(self, module: Any, width: int, batch: Batch, routed: bool) -> None:
        self.batch, self.routed = batch, routed
        weight = module.lora_A["default"].weight
        self.r = len(weight)
        network = nn.Sequential(nn.Linear(self.r, width), nn.ReLU(), nn.Linear(width, 2 * self.r**2))
        setattr(module, _NETWORK, nn.ModuleDict({"default": network.to(weight)}))
        module.adapter_layer_names = (*module.adapter_layer_names, _NETWORK)
        self.kl: _Kl | None = None

    def gaussian(self, module: Any, adapter_name: str, h: Tensor) -> tuple[Tensor, Tensor]:
        """μ and G = √Ω, (..., r, r), of A x, (..., r)."""
        mean, root = getattr(module, _NETWORK)[adapter_name](h).unflatten(-1, (2, self.r, self.r)).unbind(-3)
        return mean, root.sigmoid()

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        """``result`` + s·B(E A x); shapes as ``result``."""
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        h = a(module.lora_dropout[active_adapter](x.to(a.weight.dtype)))
        mean, root = self.gaussian(module, active_adapter, h)
        noise: Tensor | None = state_of(self)
        if noise is None and module.training:
            noise = self.batch.noise(h, self.routed, *mean.shape[-2:])
            if self.kl is not None:
                self.kl.add(mean, root)
        e = mean if noise is None else mean + q.std(root, "square") * noise.to(mean)
        return result + (b((e @ h[..., None])[..., 0]) * module.scaling[active_adapter]).to(result.dtype)


class ContextualNoise:
    """The distribution over functions: ε of all layers."""

    def __init__(self, model: nn.Module) -> None:
        self._variants = _variants(model)

    def draw(self, seed: torch.Generator) -> AbstractContextManager[None]:
        """One ε a layer, in force in this context alone."""
        sizes = {variant: (variant.r, variant.r) for variant in self._variants.values()}
        return in_context({v: torch.randn(size, generator=seed, device=seed.device) for v, size in sizes.items()})

    def mean(self) -> AbstractContextManager[None]:
        """μ, as in every forward in eval mode."""
        return nullcontext()


def _variants(model: nn.Module) -> dict[str, _ContextualVariant]:
    return {
        name: variant
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        for variant in module.lora_variant.values()
        if isinstance(variant, _ContextualVariant)
    }
