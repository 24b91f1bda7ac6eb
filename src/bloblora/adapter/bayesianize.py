"""Turning a LoRA into a distribution over LoRAs, in place."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora import GPTQLoraLinear, LoraLayer
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.layer import Embedding, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from .. import posterior as q
from ..contexts import in_context, unwrapped
from ..files import is_finite
from ..messages import quoted
from ..quantized import keep_differentiable
from .batch import follow, is_routed
from .config import BlobConfig
from .head import Bounding, GaussianHead, HeadGaussian, gaussian_heads, make_gaussian, make_plain, trained_head
from .sharding import changing, is_sharded, reshard, whole
from .variant import HEAD, BlobVariant, Drawn, Gaussian, mean_of
from .watch import KlWatch

# PEFT's layer classes that ask `lora_variant` in their forward, or are made to: the others would ignore the posterior.
_SUPPORTED_LAYERS = {"Linear", "Linear8bitLt", "Linear4bit", "HqqLoraLinear", "TorchaoLoraLinear"}
_SUPPORTED_LAYERS |= {"GPTQLoraLinear", "AwqLoraLinear"}
# Of experts that stand in one parameter: the linear layers that it is made of, by the names that targets have.
_FUSED = {
    "gate_up_proj": ("gate_up_proj", "gate_proj", "up_proj", "w1", "w3"),
    "down_proj": ("down_proj", "w2"),
    "up_proj": ("up_proj",),
}
_AT_PRIOR_TOLERANCE = 0.05
_CLASSIFIERS = {*MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()}

Weights = dict[str, dict[str, Tensor]]
"""A draw: A (r, n), B (m, r) or a head's weight (C, d) of each layer, by the layer's name and the factor."""


class Posterior:
    """View of the Gaussian over the matrices of one adapter; it holds no state beside the model's own.

    What `draw`, `mean`, `fixed` and `stacked` put in force holds in the calling context: in its thread, or its asyncio
    task. Other threads see the model as it is, or their own draws. Work that is handed to another thread sees it by
    ``contextvars.copy_context().run``, as ``asyncio.to_thread`` does.

    Attributes:
        model: the PEFT model.
        adapter_name: the Bayesian adapter.
        config: its configuration.
        prior: p, the same for all its entries, unless `named_priors` moves and scales it.
        head: the classification head whose weights are Gaussian too, if there is one.
        batch: the model's last batch in train mode.
        watch: warns when it is trained without its KL; ``watch.silent = True`` where that is meant.
    """

    def __init__(self, model: PeftModel, adapter_name: str) -> None:
        self.model = model
        self.adapter_name = adapter_name
        self._layers = dict(_bayesian_layers(model, adapter_name))
        self._first = first = _variant(next(iter(self._layers.values())), adapter_name)
        self.config = first.config
        self.watch = first.watch = first.watch or KlWatch()
        self.batch = first.batch
        self.prior = self.config.build_prior()
        self.head = next((layer for layer in self._layers.values() if isinstance(layer, GaussianHead)), None)

    def named_layers(self) -> dict[str, nn.Module]:
        """The Bayesian layers by their names in the model, in the model's order, a head last."""
        return dict(self._layers)

    def layer_names(self) -> list[str]:
        """Names of the Bayesian layers: those that draws change."""
        return [*self._layers]

    def named_means(self) -> dict[str, nn.Parameter]:
        """M of each Gaussian factor by its name: ``<layer>.lora_A`` (r, n), ``<layer>.lora_B`` (m, r): LoRA's own.

        Of a head it is ``<layer>.weight`` (C, d).
        """
        return {key: mean_of(layer, self.adapter_name, factor) for key, layer, factor in self._factors()}

    def named_std_parameters(self) -> dict[str, nn.Parameter]:
        """The unconstrained parameter of Ω of each, by the same names and of the same shapes."""
        self.watch.looked()
        return {
            key: _variant(layer, self.adapter_name).std_parameter(layer, self.adapter_name, factor)
            for key, layer, factor in self._factors()
        }

    def named_stds(self) -> dict[str, Tensor]:
        """Ω of each, by the same names and of the same shapes."""
        return {n: q.std(p, self.config.std_parameterization) for n, p in self.named_std_parameters().items()}

    @property
    def temperatures(self) -> tuple[float, float] | None:
        """T of an average over draws, and of the mean alone, by which predictions divide logits; None where they don't.

        `bloblora.set_temperature` fits them, and `bloblora.save` keeps them.
        """
        return self._first.temperatures

    @temperatures.setter
    def temperatures(self, values: tuple[float, float] | None) -> None:
        if values is not None and not (len(values) == 2 and all(is_finite(value) and value > 0 for value in values)):
            raise ValueError(f"temperatures must be two finite numbers above 0, got {values!r}")
        self._first.temperatures = None if values is None else (values[0], values[1])

    @property
    def is_disabled(self) -> bool:
        """Whether the model answers without its adapters, as inside ``disable_adapter``."""
        return next((m.disable_adapters for m in self.model.modules() if isinstance(m, BaseTunerLayer)), False)

    @property
    def uses_squares(self) -> bool:
        """Whether a training takes Ω's gradient from the squares of the examples' gradients."""
        return self.config.fisher(self.batch.expects_labels)

    @property
    def under_head(self) -> bool:
        """Whether a head that starts from nothing is trained with the adapter."""
        return _has_head(self.model, self.adapter_name)

    @property
    def adapter_is_gaussian(self) -> bool:
        """Whether there is a Gaussian over the adapter, and not over a head alone."""
        return bool(self.config.gaussian_factors)

    @property
    def is_fresh(self) -> bool:
        """Whether the adapter changes nothing yet, for B is 0 in all its layers."""
        layers: list[Any] = [layer for layer in self._layers.values() if isinstance(layer, LoraLayer)]
        return not any(layer.lora_B[self.adapter_name].weight.any() for layer in layers)

    @cached_property
    def num_weights(self) -> int:
        """How many Gaussian weights the adapter has, without a head's, in all processes together."""
        return sum(mean.numel() for key, mean in self.named_means().items() if not is_head(key))

    @contextmanager
    def bounding(self) -> Iterator[Bounding | None]:
        """Forwards in train mode inside are those of a head's mean, and tell the variance of its outputs.

        See `bloblora.adapter.head`. None where the head isn't Gaussian.
        """
        if self.head is None:
            yield None
            return
        bounding = Bounding()
        with in_context({self.head: bounding}):
            yield bounding

    def named_priors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The prior's mean μ and standard deviation s of those that have their own, by the same names and shapes.

        All entries of the others have the prior N(0, σp²), or ``prior``.
        """
        priors = {
            key: _variant(layer, self.adapter_name).prior_of(layer, self.adapter_name, factor)
            for key, layer, factor in self._factors()
        }
        return {key: prior for key, prior in priors.items() if prior is not None}

    def set_priors(self, priors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Copy a prior's mean and standard deviation for each entry, by name; numbers stand for all of a factor's."""
        for key, layer, factor in self._factors():
            if key in priors:
                _variant(layer, self.adapter_name).set_prior(layer, self.adapter_name, factor, *priors[key])

    def update_prior(self) -> None:
        """Make the posterior as it is the prior of what follows, entry by entry: μ = M and s = Ω.

        For new records, when those that it was trained on are gone.

        Raises:
            ValueError: the family of the prior isn't ``normal``, as a posterior is.
        """
        if self.config.prior != "normal":
            raise ValueError(f"BlobConfig.prior must be 'normal', as the posterior is, got {self.config.prior!r}")
        means, stds = self.named_means(), self.named_stds()
        self.set_priors({key: (whole(mean.detach()), whole(stds[key].detach())) for key, mean in means.items()})

    def restart(self) -> None:
        """Start Ω anew, and the prior as configured, around other means than those that became Bayesian."""
        for layer in self._layers.values():
            _variant(layer, self.adapter_name).init(layer, self.adapter_name)

    def start_std(self) -> float:
        """The largest Ω at the start; where priors differ, that of the median entry."""
        return self.config.start_std(self._prior_widths().median().item())

    def parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        """The means, and in the same order the unconstrained parameters of Ω."""
        return [*self.named_means().values()], [*self.named_std_parameters().values()]

    def kl(self) -> Tensor:
        """KL(q‖p) in nats: a differentiable scalar, see `bloblora.posterior.priors`.

        Where the prior has no closed form it is an estimate, with noise from torch's global generator.
        """
        adapter, head = self.kls()
        return adapter + head

    def kls(self) -> tuple[Tensor, Tensor]:
        """The KL of the adapter's factors, and that of a head's weights, in nats; see `kl`."""
        style, parameters, means = self.config.std_parameterization, self.named_std_parameters(), self.named_means()
        adapter = head = torch.zeros((), device=next(iter(means.values())).device)
        for keys, prior in self._groups():
            kl = prior.kl([whole(means[key]) for key in keys], [whole(parameters[key]) for key in keys], style)
            if is_head(keys[0]):
                head = kl.to(head.device)
            else:
                adapter = adapter + kl.to(adapter.device)
        return adapter, head

    def named_kls(self) -> dict[str, Tensor]:
        """The KL of each Gaussian factor by its name, in nats."""
        style, parameters, priors = self.config.std_parameterization, self.named_std_parameters(), self.named_priors()
        return {
            key: self._prior([priors[key]] if key in priors else []).kl([whole(mean)], [whole(parameters[key])], style)
            for key, mean in self.named_means().items()
        }

    def kl_gradients(self) -> list[tuple[str, Tensor, Tensor]]:
        """Name, tensor and gradient of `kl` of each of `parameters` that takes one, the means before those of Ω."""
        sides: tuple[Mapping[str, Tensor], ...] = self.named_means(), self.named_std_parameters()
        trained = [(key, tensor) for named in sides for key, tensor in named.items() if tensor.requires_grad]
        found: dict[Tensor, Tensor] = {}
        if trained and is_sharded(self.model):
            tensors = [tensor for _, tensor in trained]
            found |= zip(tensors, torch.autograd.grad(self.kl(), tensors), strict=True)
        elif trained:
            for keys, prior in self._groups():
                means, parameters = ([named[key] for key in keys] for named in sides)
                gradients = prior.kl_gradients(means, parameters, self.config.std_parameterization)
                found |= zip(means + parameters, gradients, strict=True)
        return [(key, tensor, found[tensor]) for key, tensor in trained]

    def flow_(self, time: float, head_time: float | None = None) -> None:
        """Move the posterior, whose Ω must be G∘G, down the gradient flow of its KL; see `bloblora.posterior`.

        What takes no gradient stays.

        Args:
            time: how far.
            head_time: how far a head's weights; default the same.
        """
        means, parameters = self.named_means(), self.named_std_parameters()
        for keys, prior in self._groups():
            own = time if head_time is None or not is_head(keys[0]) else head_time
            tensors: list[Tensor] = [named[key] for named in (means, parameters) for key in keys]
            with changing([tensor for tensor in tensors if tensor.requires_grad]) as trained:
                rest = iter(trained)
                wholes = [next(rest) if tensor.requires_grad else whole(tensor).clone() for tensor in tensors]
                prior.flow_(wholes[: len(keys)], wholes[len(keys) :], own)

    @torch.no_grad()
    def set_stds(self, stds: Mapping[str, Tensor] | float) -> None:
        """Copy Ω > 0 of each Gaussian factor, by name, in a shape that broadcasts to the factor's; or one for all."""
        for key, parameter in self.named_std_parameters().items():
            std = stds[key] if isinstance(stds, Mapping) else torch.tensor(stds)
            parameter.copy_(q.std_parameter(std, self.config.std_parameterization))

    def spread(self) -> list[Tensor]:
        """The unconstrained parameters of Ω; of a sharded model their shards, also after a forward."""
        reshard(self.model)
        return self.parameters()[1]

    def scale_(self, factor: float) -> None:
        """Multiply Ω by a factor above 0, in place."""
        with changing(self.spread()) as parameters:
            for parameter in parameters:
                std = factor * q.std(parameter, self.config.std_parameterization)
                parameter.copy_(q.std_parameter(std, self.config.std_parameterization))

    @contextmanager
    def draw(self, seed: int | torch.Generator) -> Iterator[None]:
        """Fix one draw of all weights: every forward inside is one function, in train and in eval mode.

        A draw depends on the seed, the shapes and the posterior alone: not on the device, the batch or torch's
        global generator. A copy of the model that is made inside stays this draw, so
        ``copy.deepcopy(model).merge_and_unload()`` is a plain model of it.

        Args:
            seed: an integer, or a generator from which successive draws are taken.
        """
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        with self.fixed(self.sample(generator)):
            yield

    def fixed(self, weights: Weights) -> AbstractContextManager[None]:
        """Use given weights for every forward inside; a layer that isn't in them has its mean."""
        return self._in_force({name: Drawn(weights.get(name, {})) for name in self._layers})

    def sample(self, generator: torch.Generator) -> Weights:
        """The weights of the next draw."""
        means, parameters = self.named_means(), self.named_std_parameters()
        weights: Weights = {name: {} for name in self._layers}
        for key in means:
            layer, factor = parts_of(key)
            mean, parameter = whole(means[key]), whole(parameters[key])
            weights[layer][factor] = q.sample(mean, parameter, self.config.std_parameterization, generator)
        return weights

    def without_head(self, weights: Weights) -> Weights:
        """The same draw with the mean of the head."""
        return {name: of_layer for name, of_layer in weights.items() if self._layers[name] is not self.head}

    def mirror(self, weights: Weights) -> Weights:
        """The draw as far on the other side of the mean: M − E∘Ω of M + E∘Ω."""
        means = {name: whole(mean) for name, mean in self.named_means().items()}
        return {
            layer: {factor: 2 * means[key_of(layer, factor)] - weight for factor, weight in of_layer.items()}
            for layer, of_layer in weights.items()
        }

    def stacked(self, samples: Sequence[Weights], rows: int) -> AbstractContextManager[None]:
        """Put several draws in force at once: equal parts of a batch see one each, in order.

        Args:
            samples: S draws; a layer that isn't in them has its mean.
            rows: S·b, rows of each batch inside.

        Raises:
            UnevenPartsError: by a forward inside, at a layer that doesn't see the batch row by row.
        """
        drawn = {}
        for name in self._layers:
            of_layer = [weights.get(name, {}) for weights in samples]
            stacks = {factor: torch.stack([weights[factor] for weights in of_layer]) for factor in of_layer[0]}
            drawn[name] = Drawn(stacks, rows)
        return self._in_force(drawn)

    def mean(self) -> AbstractContextManager[None]:
        """Use the mean weights M (N = 0) for every forward inside, in train mode too."""
        return self.fixed({})

    @torch.no_grad()
    def summary(self) -> dict[str, float]:
        """How far the posterior has moved.

        Returns:
            ``kl`` (nats), of it ``head_kl`` where there is a Gaussian head, ``num_parameters`` (Gaussian entries),
            ``median_std``, ``mean_abs_mean`` (average of the absolute M), ``share_at_prior``: the share of entries
            whose Ω is within 5 % of the prior's.
        """
        stds = torch.cat([whole(std).flatten() for std in self.named_stds().values()])
        means = torch.cat([whole(mean).flatten() for mean in self.named_means().values()])
        with q.separate_noise(stds.device):  # looking must not change the noise of what follows
            kl, head_kl = (part.item() for part in self.kls())
        at_prior = (stds / self._prior_widths() - 1).abs() < _AT_PRIOR_TOLERANCE
        return {
            "kl": kl + head_kl,
            **({"head_kl": head_kl} if self.head is not None else {}),
            "num_parameters": float(stds.numel()),
            "median_std": stds.median().item(),
            "mean_abs_mean": means.abs().mean().item(),
            "share_at_prior": at_prior.float().mean().item(),
        }

    def _factors(self) -> Iterator[tuple[str, nn.Module, str]]:
        for name, layer in self._layers.items():
            for factor in _variant(layer, self.adapter_name).factors:
                yield key_of(name, factor), layer, factor

    def _groups(self) -> Iterator[tuple[list[str], q.Prior | q.LocatedPrior]]:
        """Names of factors that have one prior, or each their own; a head's are apart."""
        own = self.named_priors()
        keys = [key for key, _, _ in self._factors()]
        heads = [key for key in keys if is_head(key)]
        plain = [key for key in keys if key not in own]
        moved = [key for key in keys if key in own and key not in heads]
        for group in (plain, moved, heads):
            if group:
                yield group, self._prior([own[key] for key in group if key in own])

    def _prior(self, priors: Sequence[tuple[Tensor, Tensor]]) -> q.Prior | q.LocatedPrior:
        """The prior of some factors, given μ and s of each where they have them."""
        if not priors:
            return self.prior
        means, stds = zip(*priors, strict=True)
        return q.LocatedPrior(self.prior, [*means], [*stds])

    def _prior_widths(self) -> Tensor:
        """Standard deviation of the prior of each entry, in the order of `named_means`."""
        own, std = self.named_priors(), self.prior.prior_std
        widths = [
            own[key][1] if key in own else torch.full(mean.shape, std, device=mean.device)
            for key, mean in self.named_means().items()
        ]
        return torch.cat([width.flatten() for width in widths])

    def _in_force(self, drawn: Mapping[str, Drawn]) -> AbstractContextManager[None]:
        """What each layer has, by its name."""
        changed = {name: layer for name, layer in self._layers.items() if drawn[name].weights}
        merged = [name for name, layer in changed.items() if self.adapter_name in getattr(layer, "merged_adapters", ())]
        if merged:
            raise ValueError(
                f"adapter {self.adapter_name!r} is merged into {merged[0]}, where a draw of its weights has no effect; "
                "call model.unmerge_adapter(), or ask for the mean alone (num_samples=0)"
            )
        return in_context({_variant(layer, self.adapter_name): drawn[name] for name, layer in self._layers.items()})


def bayesianize(model: PeftModel, config: BlobConfig | None = None, adapter_name: str | None = None) -> Posterior:
    """Put a Gaussian over A in every LoRA layer, in place.

    The mean starts at the adapter's A, fresh or trained; what else is trained stays deterministic. By ``factors`` and
    ``head_prior_std`` of `BlobConfig` the Gaussian can be over other weights.
    Outside ``posterior.draw`` and ``posterior.mean`` a model in train mode draws fresh noise per example, in eval mode
    it uses the mean. Ω is trained where A is: for an adapter that was loaded for inference and is frozen,
    ``model.set_adapter(adapter_name)`` makes A, B and Ω trainable together. ``model.save_pretrained`` then writes what
    `bloblora.save` does.

    Args:
        model: a PEFT model with a LoRA adapter.
        config: the posterior's configuration; default `BlobConfig()`.
        adapter_name: which adapter; default the active one.

    Returns:
        The posterior.

    Raises:
        TypeError: ``model`` is no PEFT model, or ``config`` no `BlobConfig`.
        ValueError: the adapter isn't there, isn't LoRA, is Bayesian already, or has a part that can't be Bayesian, or
            by `bloblora.quantized.keep_differentiable`.

    Warns:
        UserWarning: all linear layers have a LoRA, and experts of a mixture that aren't linear layers have none.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"bayesianize needs a PEFT model (get_peft_model(base, LoraConfig(...))), got {type(model).__name__}"
        )
    if not isinstance(config, BlobConfig | None):
        raise TypeError(f"config must be a bloblora.BlobConfig, as BlobConfig(prior_std=0.1), got {quoted(config)}")
    from .storage import save_pretrained

    adapter_name = adapter_name or model.active_adapter
    layers = check_layers(model, adapter_name)
    if heads := gaussian_heads(model, adapter_name):
        raise ValueError(
            f"{next(iter(heads))} is Bayesian already; call find_posterior(model), or make a new adapter for another "
            "configuration"
        )
    lora: Any = model.peft_config[adapter_name]
    check_exact_start(lora.init_lora_weights)
    _warn_of_experts(model, layers)
    keep_differentiable(model)
    config, head = config or BlobConfig(), trained_head(model, adapter_name)
    under_head = _has_head(model, adapter_name)
    classifies = head is not None and _gives_labels(model.get_base_model(), lora.task_type)
    config = config.resolved(under_head, head[1].in_features if head is not None and classifies else None)
    if config.head_prior_std != "none" and not classifies:
        raise ValueError(
            f"BlobConfig.head_prior_std is {config.head_prior_std}, and adapter {adapter_name!r} trains no head that "
            "ends in a linear layer and gives texts one label each; make it with LoraConfig(task_type='SEQ_CLS') on "
            "such a model, or leave head_prior_std out"
        )
    if config.factors == config.head_prior_std == "none":
        raise ValueError(
            "BlobConfig.factors is 'none', and the head is no Gaussian either, so that nothing would be: give factors "
            "'A', or head_prior_std 'auto' where LoraConfig(task_type='SEQ_CLS') trains a head that gives labels"
        )
    moved = moves_base(lora.init_lora_weights)
    embedding = _embedding_weight(model.get_base_model())
    batch = follow(model.get_base_model())
    for name, layer in layers.items() if config.gaussian_factors else ():
        if type(layer) is AwqLoraLinear:  # made of the same parts, but its forward asks no variant
            layer.__class__ = GPTQLoraLinear  # type: ignore[assignment]
        variant = BlobVariant(config, batch, is_routed(name))
        variant.prior_at_start |= moved and config.prior_mean == "auto"
        # A quantized layer may have no `weight`.
        if embedding is not None and getattr(layer.get_base_layer(), "weight", None) is embedding:
            variant.tied_config = getattr(model.get_base_model(), "config", None)
        variant.init(layer, adapter_name)
        layer.lora_variant[adapter_name] = variant
    if config.head_prior_std != "none":
        assert head is not None
        make_gaussian(*head, HeadGaussian(config, batch), adapter_name)
        tuner: Any = model.base_model
        tuner.merge_adapter = partial(_merge_adapter, tuner)
    # A partial: copies and pickles of the model hold one of themselves, where a bound method would come back as PEFT's.
    model.save_pretrained = partial(save_pretrained, model)  # type: ignore[method-assign]
    return Posterior(model, adapter_name)


def debayesianize(model: PeftModel, adapter_name: str | None = None) -> None:
    """Take the Gaussian away again, in place: a plain LoRA of the mean is left.

    Args:
        model: a PEFT model.
        adapter_name: which adapter; default the active one. A plain one stays as it is.
    """
    adapter_name = adapter_name or model.active_adapter
    for _, layer in [*_bayesian_layers(model, adapter_name)]:
        if isinstance(layer, GaussianHead):
            make_plain(layer)
        else:
            _variant(layer, adapter_name).remove(layer, adapter_name)
    if not any(find_posterior(model, name) for name in model.peft_config):
        vars(model).pop("save_pretrained", None)
        vars(model.base_model).pop("merge_adapter", None)


def find_posterior(model: nn.Module, adapter_name: str | None = None) -> Posterior | None:
    """The posterior of an adapter (default: the active one) of a model, or None where it is a plain LoRA.

    The model may be compiled, or wrapped for several processes or devices.
    """
    model = unwrapped(model)
    if not isinstance(model, PeftModel):
        return None
    adapter_name = adapter_name or model.active_adapter
    return Posterior(model, adapter_name) if any(True for _ in _bayesian_layers(model, adapter_name)) else None


def _merge_adapter(tuner: Any, *args: Any, **kwargs: Any) -> None:
    """PEFT's, which leaves heads as they are; a ValueError where a draw of one is in force, which it'd leave out."""
    for head in tuner.modules():
        if isinstance(head, GaussianHead) and (drawn := head.gaussian.drawn) is not None and HEAD in drawn.weights:
            raise ValueError(
                "merge_adapter leaves the classification head as it is, and a draw of it is in force: call "
                "merge_and_unload on a copy of the model, or merge the mean outside of the draw"
            )
    type(tuner).merge_adapter(tuner, *args, **kwargs)


def _has_head(model: PeftModel, adapter_name: str) -> bool:
    """Language models may save an embedding, or the head that they came with."""
    lora: Any = model.peft_config[adapter_name]
    return bool(lora.modules_to_save) and lora.task_type not in ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def _gives_labels(base: Any, task_type: str | None) -> bool:
    """Whether a model's logits are those of classes that exclude each other, one for each text.

    Where the adapter doesn't say what it is for, the class of one of transformers' models does.
    """
    own = not isinstance(base, PreTrainedModel) or type(base).__name__ in _CLASSIFIERS
    if task_type != "SEQ_CLS" and not (task_type is None and own):
        return False
    config, embeddings = getattr(base, "config", None), getattr(base, "get_output_embeddings", None)
    if embeddings is not None and embeddings() is not None:
        return False
    one_of_them = getattr(config, "problem_type", None) in (None, "single_label_classification")
    return one_of_them and getattr(config, "num_labels", 2) > 1


def _variant(layer: nn.Module, adapter_name: str) -> Gaussian:
    variant = layer.gaussian if isinstance(layer, GaussianHead) else layer.lora_variant[adapter_name]  # type: ignore[index]
    assert isinstance(variant, Gaussian)
    return variant


def key_of(layer: str, factor: str) -> str:
    """Name of a Gaussian factor."""
    return f"{layer}.{factor}" if factor == HEAD else f"{layer}.lora_{factor}"


def is_head(key: str) -> bool:
    """Whether a Gaussian factor is a head's weight, by its name."""
    return key.endswith(f".{HEAD}")


def parts_of(key: str) -> tuple[str, str]:
    """Layer and factor of a Gaussian factor's name."""
    layer, _, name = key.rpartition(".")
    return layer, name.removeprefix("lora_")


def _embedding_weight(base: nn.Module) -> Tensor | None:
    """The input embedding, to which a head may be tied; None for a model that has none."""
    find = getattr(base, "get_input_embeddings", None)
    return getattr(find(), "weight", None) if find else None


def _bayesian_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, nn.Module]]:
    module: nn.Module
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and isinstance(module.lora_variant.get(adapter_name), BlobVariant):
            yield name, module
    for name, head in gaussian_heads(model, adapter_name).items():
        yield name, head


def moves_base(start: object) -> bool:
    """Whether an ``init_lora_weights`` moves a part of the base weights into B A: the base isn't the model without."""
    return str(start).lower().startswith(("pissa", "olora", "loftq"))


def check_exact_start(start: object) -> None:
    """Raise a ValueError for an ``init_lora_weights`` that moves a part of the base weights by chance, or by data.

    PEFT draws the one again when the adapter is loaded, and doesn't have the other then.
    """
    if str(start).startswith("pissa_niter_"):
        why = "a random part out of the base weights, which is another one each time the adapter is loaded"
    elif str(start).startswith(("corda", "lora_ga")):
        why = "a part out of the base weights that depends on data, which aren't there when the adapter is loaded"
    else:
        return
    raise ValueError(f"init_lora_weights is {quoted(start)}: it takes {why}; give pissa, whose part is the same")


def check_layers(model: PeftModel, adapter_name: str) -> dict[str, LoraLayer]:
    """The adapter's layers by name; a ValueError where one can't be Bayesian."""
    if adapter_name not in model.peft_config:
        raise ValueError(f"adapter_name: no adapter {adapter_name!r}; the model has {', '.join(model.peft_config)}")
    if (kind := model.peft_config[adapter_name].peft_type) != "LORA":
        raise ValueError(
            f"adapter {adapter_name!r} is of type {PeftType(kind).value}; it must be LORA, made with "
            "peft.LoraConfig, for no other has an A matrix to be Bayesian over"
        )
    layers, problems = {}, []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter_name not in (
            *module.lora_A,
            *module.lora_embedding_A,
        ):
            continue
        layers[name] = module
        if problem := _problem(module, adapter_name):
            problems.append(f"{name}: {problem}")
    problems += _experts_without_adapter(model, adapter_name)
    if problems:
        more = f"\n… and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError("these layers can't be Bayesian:\n" + "\n".join(problems[:5]) + more)
    if not layers:
        raise ValueError(f"adapter {adapter_name!r} has no LoRA layer")
    return layers


def _warn_of_experts(model: PeftModel, layers: Mapping[str, LoraLayer]) -> None:
    """Warn where every linear layer below the head has a LoRA, as 'all-linear' asks, and experts have none."""
    base = model.get_base_model()
    adapted = {layer.get_base_layer() for layer in layers.values()}
    heads = {module for name, module in base.named_children() if isinstance(module, nn.Linear)}
    lora = {part for layer in layers.values() for part in (*layer.lora_A.values(), *layer.lora_B.values())}
    if {m for m in base.modules() if isinstance(m, nn.Linear)} - adapted - heads - lora:
        return
    names = [n for n, p in base.named_parameters() if p.ndim == 3 and n.rpartition(".")[2] in _FUSED]
    if names:
        warnings.warn(
            f"all linear layers have a LoRA, but the experts have none: {names[0]} and {len(names) - 1} more are "
            "parameters without linear layers, which 'all-linear' doesn't find and a posterior can't be on",
            stacklevel=3,
        )


def _experts_without_adapter(model: PeftModel, adapter_name: str) -> list[str]:
    """Experts that stand in one parameter, without a linear layer that PEFT could have found by its name."""
    config: Any = model.peft_config[adapter_name]
    problems = []
    for name, parameter in model.get_base_model().named_parameters():
        place, _, own = name.rpartition(".")
        meant = [part for part in _FUSED.get(own, ()) if check_target_module_exists(config, f"{place}.{part}")]
        if parameter.ndim == 3 and meant:
            problems.append(
                f"{name}: {len(parameter)} experts in one parameter have no linear layers, so target_modules "
                f"{meant[0]!r} doesn't adapt them; give paths that are those of linear layers only, such as "
                f"'self_attn.q_proj' or 'shared_expert.{meant[0]}', or exclude_modules=['{place.rpartition('.')[2]}."
                f"{meant[0]}']"
            )
    return problems


def _problem(layer: LoraLayer, adapter_name: str) -> str | None:
    if isinstance(layer, Embedding):
        return "LoRA on an embedding looks up columns of A and has no product to draw; remove it from target_modules"
    variant = layer.lora_variant.get(adapter_name)
    if isinstance(variant, BlobVariant):
        return "is Bayesian already; call find_posterior(model), or make a new adapter for another configuration"
    if variant is not None:
        kind = type(variant).__name__.removesuffix("LinearVariant").removesuffix("Variant")
        wanted = next((names for names, own in layer.lora_variants.items() if own is type(variant)), ("it",))
        return f"uses the LoRA variant {kind}, which defines its own forward; switch {wanted[0]} off in LoraConfig"
    if isinstance(layer, ParamWrapper):
        return (
            f"LoRA on the parameter {layer.parameter_name!r}, such as that of all experts, is added to the weight and "
            "has no product to draw; leave it out of target_parameters and target_modules (PEFT makes 'all-linear' "
            "and names of experts into parameters)"
        )
    if type(layer).__name__ not in _SUPPORTED_LAYERS:
        supported = ", ".join(sorted(_SUPPORTED_LAYERS))
        return f"class {type(layer).__name__} isn't supported (only {supported}); remove it from the targets"
    if layer.merged:
        return "is merged into the base weight; call model.unmerge_adapter() first"
    return None
