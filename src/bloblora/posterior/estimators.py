r"""Stochastic products h = A x with a Gaussian A: how the noise of a training step is shared.

All have the mean M x and the per-entry variance Ω² x²; they differ in what they correlate, and so in the variance
of the gradient. ``A_k`` is the weight that example k of the batch sees, for every one of its tokens:

- ``independent``: A_k = M + E_k∘Ω, a fresh E_k an example;
- ``flipout``: A_k = M + (t_k s_kᵀ)∘E∘Ω, one E a batch, random signs an example (BLoB, arXiv 2406.11675, eq. 12);
- ``shared``: A_k = M + E∘Ω, one E for the batch: a true draw of the weights;
- ``local``: h ~ N(M x, Ω² x²) drawn afresh for every *token* (Kingma et al., arXiv 1506.02557), so a sequence does
  not see one function.

The gradient that Ω is trained with has two estimates. ``reparameterization`` is E∘∂NLL/∂A_k: without bias, but noise of
either sign, which on the thousands of entries of a layer drowns what few records say of each. ``fisher`` uses Price's
theorem, and the squares of the examples' gradients for the Hessian (the empirical Fisher; VOGN, Khan et al., arXiv
1806.04854, section 3):

.. math:: \nabla_\Omega\, \mathbb E_q[\mathrm{NLL}] = \Omega \circ \mathbb E_q[\nabla^2_{AA}\,\mathrm{NLL}]
          \approx \Omega \circ \frac1b \sum_k (\nabla_{A_k} \mathrm{NLL}_k)^2

They are at hand, for each example has its own A_k, and have one sign. tests/training/test_referee.py shows how near the
optimum of the bound each comes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ESTIMATORS = ("independent", "flipout", "shared", "local")
PER_EXAMPLE = ESTIMATORS[:2]
"""Those that give each example a draw of its own."""

# Slices of tokens: few, for they are launches on a GPU, and where they can be small enough for a processor's cache.
_MAX_SLICES, _MIN_ROWS = 16, 128


def project(
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    estimator: str,
    parts: int | Sequence[int] | None = None,
    squares: int | Tensor | None = None,
) -> Tensor:
    """Multiply inputs by fresh draws of A, with noise from torch's global generator.

    The global generator is the one that gradient checkpointing replays and that checkpoints of a training save.
    Beside ``x`` nothing of its size is made: the weights of a batch are (b, r, n), the products (b, T, r).

    Args:
        x: (b, ..., n); the first dimension is the example.
        mean: M, (r, n).
        std: Ω, (r, n).
        estimator: one of ``ESTIMATORS``.
        parts: of an x in which the first dimension is not the example, for ``independent`` and ``flipout``: into how
            many equal parts all its rows are divided, or the lengths of the parts; each has a draw.
        squares: with ``independent`` and ``flipout``, factor of the squares of the draws' gradients, one number or
            (b,), of which what is in it at the backward counts: the number of NLLs of which the loss is the mean makes
            Ω's gradient the ``fisher`` estimate. None: ``reparameterization``.

    Returns:
        h, (b, ..., r).
    """
    std = std.to(mean.dtype)
    if estimator == "shared":
        return F.linear(x, mean + torch.randn_like(std) * std)
    x = x.to(mean.dtype)
    # Autocast casts the operations of a Function's forward, but not those of its backward.
    autocast = torch.amp.is_autocast_available(x.device.type)  # torch's meta device has none
    with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
        if estimator == "local":
            noise = torch.randn(*x.shape[:-1], len(mean), dtype=mean.dtype, device=mean.device)
            return _LocalLinear.apply(x, mean, std.square(), noise)
        if isinstance(parts, Sequence):
            weights = _ExampleWeights.apply(mean, std, _example_noise(len(parts), std, estimator), squares)
            pieces = x.flatten(0, -2).split([*parts])
            h = torch.cat([F.linear(piece, weight) for piece, weight in zip(pieces, weights, strict=True)])
        else:
            b, rows = x.shape[0] if parts is None else parts, x.shape[:-1].numel()
            grouped = x.reshape(b, rows // b if b else 0, x.shape[-1])  # an expert may see no row
            h = _ExampleLinear.apply(grouped, mean, std, _example_noise(b, std, estimator), squares)
    return h.reshape(*x.shape[:-1], len(mean))


@contextmanager
def separate_noise(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Leave torch's global generators of the CPU and of ``device`` as they were; with a seed they start from it inside.

    Other devices are not touched: asking all of them at every step would cost time, and torch warns of it.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if seed is not None:
            torch.random.default_generator.manual_seed(seed)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
        yield


def _example_noise(b: int, like: Tensor, estimator: str) -> Tensor:
    """E_k of each example, (b, r, n)."""
    r, n = like.shape
    if estimator == "independent":
        return torch.randn(b, r, n, dtype=like.dtype, device=like.device)
    signs = torch.randint(0, 2, (b, r + n), dtype=like.dtype, device=like.device).mul_(2).sub_(1)
    return torch.randn_like(like) * signs[:, :r, None] * signs[:, None, r:]


class _ExampleLinear(torch.autograd.Function):
    """x_k (M + E_k∘Ω)ᵀ of each example k: autograd would take three times the operations, and as many more on E∘Ω."""

    @staticmethod
    def forward(ctx, x: Tensor, mean: Tensor, std: Tensor, noise: Tensor, squares: Any) -> Tensor:  # type: ignore[no-untyped-def]
        weights = torch.addcmul(mean, noise, std)
        ctx.save_for_backward(x, weights, noise if squares is None else std)
        ctx.squares = squares
        return torch.bmm(x, weights.mT)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:  # type: ignore[no-untyped-def]
        x, weights, kept = ctx.saved_tensors
        grad_x = torch.bmm(grad, weights) if ctx.needs_input_grad[0] else None
        grad_weights = torch.bmm(grad.mT, x)
        return grad_x, grad_weights.sum(0), _std_gradient(grad_weights, kept, ctx.squares), None, None


class _ExampleWeights(torch.autograd.Function):
    """M + E_k∘Ω of each example k, (b, r, n)."""

    @staticmethod
    def forward(ctx, mean: Tensor, std: Tensor, noise: Tensor, squares: Any) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(noise if squares is None else std)
        ctx.squares = squares
        return torch.addcmul(mean, noise, std)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[no-untyped-def]
        return grad.sum(0), _std_gradient(grad, ctx.saved_tensors[0], ctx.squares), None, None


def _std_gradient(grad_weights: Tensor, kept: Tensor, squares: int | Tensor | None) -> Tensor:
    """Ω's gradient (r, n), from those of each example's A_k (b, r, n).

    ``kept`` is the noise (b, r, n) where ``squares`` is None, and Ω otherwise.
    """
    if squares is None:
        return (grad_weights * kept).sum(0)
    squared = grad_weights.square()
    if isinstance(squares, Tensor) and squares.ndim:
        return torch.tensordot(squares.to(squared.dtype), squared, 1).mul_(kept)
    return squared.sum(0).mul_(kept).mul_(squares)


class _LocalLinear(torch.autograd.Function):
    """x Mᵀ + √((x∘x) Vᵀ)∘E in slices of tokens, so that x∘x never exists whole."""

    @staticmethod
    def forward(ctx, x: Tensor, mean: Tensor, variance: Tensor, noise: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        h = F.linear(x, mean)
        squares = torch.cat([F.linear(piece.square(), variance) for piece in _slices(x)]).reshape(h.shape)
        std = squares.clamp_min_(torch.finfo(squares.dtype).tiny).sqrt_()
        ctx.save_for_backward(x, mean, variance, noise, std)
        return h.addcmul_(std, noise)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        x, mean, variance, noise, std = ctx.saved_tensors
        grad_std = grad * noise / std  # d√v is half of dv/√v, and for x the square gives the 2 back
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if ctx.needs_input_grad[0] else None
        grad_mean, grad_variance = torch.zeros_like(mean), torch.zeros_like(variance)
        pieces = [_slices(tensor) for tensor in (x, grad, grad_std, x if grad_x is None else grad_x)]
        for x_piece, piece, std_piece, out in zip(*pieces, strict=True):
            grad_mean.addmm_(piece.mT, x_piece)
            grad_variance.addmm_(std_piece.mT, x_piece.square(), alpha=0.5)
            if grad_x is not None:
                torch.mm(std_piece, variance, out=out).mul_(x_piece).addmm_(piece, mean)
        return grad_x, grad_mean, grad_variance, None


def _slices(tensor: Tensor) -> tuple[Tensor, ...]:
    """Rows of the last dimension, a few at a time: views."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows.split(max(_MIN_ROWS, -(-len(rows) // _MAX_SLICES)))
