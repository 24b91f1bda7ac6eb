r"""Stochastic products h = A x with a Gaussian A: how the noise of a training step is shared.

All have the mean M x and the per-entry variance Ω² x²; they differ in what they correlate, and so in the variance
of the gradient. ``A_k`` is the weight that example k of the batch sees, for every one of its tokens:

- ``independent``: A_k = M + E_k∘Ω, a fresh E_k an example;
- ``flipout``: A_k = M + (t_k s_kᵀ)∘E∘Ω, one E a batch, random signs an example (BLoB, arXiv 2406.11675, eq. 12);
- ``shared``: A_k = M + E∘Ω, one E for the batch: a true draw of the weights;
- ``local``: h ~ N(M x, Ω² x²) drawn afresh for every *token* (Kingma et al., arXiv 1506.02557), so a sequence does
  not see one function.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ESTIMATORS = ("independent", "flipout", "shared", "local")


_SLICES = 16


def project(x: Tensor, mean: Tensor, std: Tensor, estimator: str) -> Tensor:
    """Multiply inputs by fresh draws of A, with noise from torch's global generator.

    The global generator is the one that gradient checkpointing replays and that checkpoints of a training save.
    Beside ``x`` nothing of its size is made: the weights of a batch are (b, r, n), the products (b, T, r).

    Args:
        x: (b, ..., n); the first dimension is the example.
        mean: M, (r, n).
        std: Ω, (r, n).
        estimator: one of ``ESTIMATORS``.

    Returns:
        h, (b, ..., r).
    """
    if estimator == "local":
        # Autocast casts the operations of a Function's forward, but not those of its backward.
        with torch.autocast(x.device.type, enabled=False):
            variance = _SquaredLinear.apply(x, std.square())
        h = F.linear(x, mean)
        return h + variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt() * torch.randn_like(h)
    if estimator == "shared":
        return F.linear(x, mean + torch.randn_like(std) * std)
    weights = mean + _example_noise(x, std, estimator)
    return torch.bmm(x.reshape(x.shape[0], -1, x.shape[-1]), weights.mT).reshape(*x.shape[:-1], -1)


def _example_noise(x: Tensor, std: Tensor, estimator: str) -> Tensor:
    """Noise of each example's weight, (b, r, n)."""
    b, (r, n) = x.shape[0], std.shape
    if estimator == "independent":
        return torch.randn(b, r, n, dtype=std.dtype, device=std.device) * std
    rows, columns = _signs((b, r, 1), std), _signs((b, 1, n), std)
    return (torch.randn_like(std) * std) * rows * columns


def _signs(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.randint(0, 2, shape, device=like.device).to(like.dtype) * 2 - 1


class _SquaredLinear(torch.autograd.Function):
    """(x∘x) Wᵀ in slices of tokens, so that x∘x never exists whole."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        rows = x.reshape(-1, x.shape[-1])
        pieces = [F.linear(piece.square(), weight) for piece in _slices(rows)]
        return torch.cat(pieces).reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor]:  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = (grads @ weight).mul_(rows).mul_(2).reshape(x.shape) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight)
        for piece, grad_piece in zip(_slices(rows), _slices(grads), strict=True):
            grad_weight += grad_piece.mT @ piece.square()
        return grad_x, grad_weight


def _slices(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split(-(-rows.shape[0] // _SLICES))
