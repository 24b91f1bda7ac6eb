r"""A Gaussian over the weights of a classification head that is trained with the adapter.

.. math:: z = W\phi + b, \qquad q(W_{ci}) = \mathcal N(M_{ci}, \Omega_{ci}^2), \qquad
          z_c \sim \mathcal N\Big((M\phi + b)_c,\ v_c = \sum_i \Omega_{ci}^2 \phi_i^2\Big)

In train mode a forward draws W afresh for each example, as the adapter's layers draw A. Where the logits are those of
classes, `BlobTrainerMixin` asks for `Bounding` instead: z is then the mean's, and v goes into a bound of the expected
NLL that needs no draws (`bloblora.tasks.Likelihood.noise_cost`).
"""

import math
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional as F

from .. import posterior as q
from ..contexts import state_of
from .sharding import whole
from .variant import HEAD, STD_PARAMETER, Gaussian

_DRAWS = 128


class Bounding:
    """What is in force for a head whose forwards in train mode are the mean's, and whose variance is asked for.

    Attributes:
        outputs: z (…, C) and v (…, C) of each forward so far.
    """

    def __init__(self) -> None:
        self.outputs: list[tuple[Tensor, Tensor]] = []

    def variance_of(self, logits: Tensor) -> Tensor:
        """v (b, C) of the logits that were made of the last forward's outputs (b, …, C), differentiable.

        Which of the outputs they are is their derivative, for selecting is linear.
        """
        output, variance = self.outputs[-1]
        (selected,) = torch.autograd.grad(logits, output, torch.ones_like(logits), retain_graph=True)
        return (selected * variance).reshape(len(logits), -1, logits.shape[-1]).sum(1)


@torch.no_grad()
def average_head(head: "GaussianHead", logits: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    r"""The mean of class probabilities over a head's draws, and how much of its uncertainty is that they disagree.

    .. math:: \mathbb E[\mathrm{softmax}(z + \sqrt v \circ \epsilon)] \approx
              \mathrm{softmax}\Big(\frac{z}{\sqrt{1 + \pi v/8}}\Big)

    the mean-field approximation of Lu, Ie & Sha (arXiv 2006.07584), for two classes MacKay's (1992). The epistemic
    share of the entropy is :math:`\mathrm I / \mathrm H[\bar p]` with the mutual information
    :math:`\mathrm I = \mathrm H[\bar p] - \mathbb E\,\mathrm H[p]` of answer and head, and that of the variance of "it
    is class c" is :math:`\mathrm{Var}[p_c] / \bar p_c(1 - \bar p_c)`. They are those of `_DRAWS` draws ε that are the
    same for all inputs, in pairs ε and −ε, and don't depend on a temperature, by which the mean is divided afterwards.

    Args:
        head: the head.
        logits: z (b, C); -inf for a class that isn't there.
        read: what the head read of each input, (b, d).

    Returns:
        Logits of the mean (b, C), and the shares (b, 1 + C), of the entropy and of each class's variance; float32.
    """
    z, variance = logits.float(), head.variance(read).float()
    std = variance.sqrt()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(_DRAWS // 2, z.shape[-1], generator=generator).to(z.device)
    entropy, (mean, square) = torch.zeros(len(z), device=z.device), torch.zeros(2, *z.shape, device=z.device)
    for epsilon in (*noise, *-noise):
        p = (z + std * epsilon).softmax(-1)
        mean += p / _DRAWS
        square += p.square() / _DRAWS
        entropy += torch.special.entr(p).sum(-1) / _DRAWS
    of_mean = torch.cat([torch.special.entr(mean).sum(-1, keepdim=True), mean * (1 - mean)], -1)
    within = torch.cat([entropy[:, None], mean - square], -1)
    shares = 1 - within / of_mean.clamp_min(1e-12)
    return z / (1 + math.pi / 8 * variance).sqrt(), shares.where(of_mean > 1e-12, 0).clamp(0, 1)


class HeadGaussian(Gaussian):
    """The posterior of a head's weights."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.factors = (HEAD,)

    @property
    def _usual_width(self) -> float:
        assert isinstance(self.config.head_prior_std, float | int)
        return self.config.head_prior_std

    def _prior_width(self, mean: Tensor, factor: str) -> float:
        return self._usual_width

    def prior_of(self, module: Any, adapter_name: str, factor: str) -> tuple[Tensor, Tensor]:
        """μ and s of the prior: those that were set, or else 0 and ``head_prior_std``."""
        if (prior := super().prior_of(module, adapter_name, factor)) is not None:
            return prior
        weight = module.weight
        numbers = torch.tensor([0.0, self._usual_width], dtype=torch.promote_types(weight.dtype, torch.float32))
        mean, std = numbers.to(weight.device)
        return mean.expand(weight.shape), std.expand(weight.shape)


class GaussianHead(nn.Linear):
    """A linear layer whose weights are Gaussian; `make_gaussian` makes it of one in place.

    Attributes:
        gaussian: the posterior of its weights.
        adapter_name: whose head it is.
    """

    gaussian: HeadGaussian
    adapter_name: str

    def forward(self, x: Tensor) -> Tensor:
        """z (…, C) of φ (…, d)."""
        bounding = state_of(self)
        if bounding is not None and self.training and self.gaussian.drawn is None:
            return self._bounded(x, bounding)
        z = self.gaussian.product(HEAD, self, self.adapter_name, x)
        return z if self.bias is None else z + self.bias

    def variance(self, x: Tensor) -> Tensor:
        """v (…, C) of φ (…, d), float32 or wider."""
        parameter = whole(self.gaussian.std_parameter(self, self.adapter_name, HEAD))
        std = q.std(parameter, self.gaussian.config.std_parameterization)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(std.dtype).square(), std.square())

    @torch.compiler.disable  # what is compiled together has no derivative from one of its outputs to another
    def _bounded(self, x: Tensor, bounding: Bounding) -> Tensor:
        z, variance = F.linear(x, self.weight, self.bias), self.variance(x)
        # A forward that doesn't use Ω would get no gradient of it from DistributedDataParallel.
        z = z + 0 * variance.to(z.dtype)
        bounding.outputs.append((z, variance))
        return z


class GaussianHeadWrapper(ModulesToSaveWrapper):
    """PEFT's wrapper of a module with such a head, whose Ω is in a file of its own, and which merges to a plain one."""

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """As PEFT's, without Ω, which isn't in the file that PEFT reads."""
        known = super().adapter_state_dict_load_map(adapter_name)
        return {file: own for file, own in known.items() if STD_PARAMETER not in file}

    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As PEFT's; the head is a plain one, of the draw in force or the mean."""
        module = super().unload_and_optionally_merge_module(*args, **kwargs)
        for head in [part for part in module.modules() if isinstance(part, GaussianHead)]:
            drawn = head.gaussian.drawn
            if drawn is not None and HEAD in drawn.weights:
                head.weight.data = drawn.weights[HEAD].detach().to(head.weight).clone()
            make_plain(head)
        return module


def trained_head(model: PeftModel, adapter_name: str) -> tuple[ModulesToSaveWrapper, nn.Linear] | None:
    """The linear layer that PEFT trains beside an adapter and that gives the logits, in its wrapper; None without one.

    It is the last layer of the last module that is trained so.
    """
    found = None
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save:
            parts = [part for part in wrapper.modules_to_save[adapter_name].modules() if _has_weight(part)]
            found = (wrapper, parts[-1]) if parts and type(parts[-1]) is nn.Linear else None
    return found


def gaussian_heads(model: nn.Module, adapter_name: str) -> dict[str, GaussianHead]:
    """The Gaussian heads of an adapter, by their names in PEFT's files."""
    place = f".modules_to_save.{adapter_name}"
    return {
        name.replace(place, ""): module
        for name, module in model.named_modules()
        if isinstance(module, GaussianHead) and module.adapter_name == adapter_name
    }


def make_gaussian(wrapper: ModulesToSaveWrapper, head: nn.Linear, gaussian: HeadGaussian, adapter_name: str) -> None:
    """Turn a linear layer into a `GaussianHead`, in place."""
    wrapper.__class__ = GaussianHeadWrapper
    _turn(head, GaussianHead)
    assert isinstance(head, GaussianHead)
    head.gaussian, head.adapter_name = gaussian, adapter_name
    gaussian.init(head, adapter_name)


def make_plain(head: GaussianHead) -> None:
    """The reverse of `make_gaussian`: a head of its mean."""
    head.gaussian.remove(head, head.adapter_name)
    for name in [name for name, _ in head.named_children()]:
        delattr(head, name)
    del head.gaussian, head.adapter_name
    _turn(head, nn.Linear)


def _turn(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give a module another class; accelerate's hook of it has the method of the old one."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        remove_hook_from_module(module)
    module.__class__ = kind
    if hook is not None:
        add_hook_to_module(module, hook)


def _has_weight(module: nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), nn.Parameter)
