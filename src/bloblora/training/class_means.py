r"""A classification head that isn't trained: a class is the mean of what its training records look like to the head.

With φ what the head reads of a text, m_c the mean of a class's φ and π_c its share, a record is compared with means
that leave itself out,

.. math:: z_c(\phi_k) = s\,\big(\phi_k^\top P m_c - \tfrac12 m_c^\top P m_c\big) + \log \pi_c, \qquad
          m_{y_k} \text{ and } \pi_{y_k} \text{ without } k, \qquad
          \mathrm{NLL}_k = -\log \mathrm{softmax}(z(\phi_k))_{y_k}

(nearest class means, Mensink et al. 2012; leaving out, Geisser & Eddy 1979), so that what is below the head learns to
put *new* records near those of their class, and can't learn a record by heart through its own mean. P is the inverse of
the covariance of all φ before the first step, half of which is a multiple of I, and s = 17/d, d the length of φ.

A step sees a batch. The φ of all other records are those that were last seen, and the gradient is that of the sum over
*all* records with respect to the φ of the batch, over b: its mean over the batches is the gradient of the mean NLL.

Under a Gaussian over A each φ_k has a draw A_k of its own, in the batch and from when it was last seen. The objective
is therefore E[mean NLL] over independent A_k, not over one A that all records share. Means of many records then have
little noise, as those of the final head, which are computed with the mean of A.

In the end the head is the linear discriminant of all training records (Fisher 1936), for which P is the inverse of the
covariance S within the classes, shrunk towards a multiple of I (Friedman 1989). The mean of n_c records has noise of
covariance S / n_c, which makes mᵀPm too large by tr PS / n_c on average, and so a class with few records too unlikely:
that is taken off (Huang, Tong & Zhao 2010). Shrinkage and scale are those of the lowest NLL of the validation records;
without them 0.9 and s. The training records, each left out, would ask for a scale that is several times too large, for
what is below the head has been trained on them. When nothing else needs the validation records, they join their
classes, and choose shrinkage and scale once more, each left out of means, P and S.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from ..contexts import hooked
from ..files import read_tensors, write_tensors
from ..prediction.states import mean_where_read

SHRINKAGES = (0.01, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
_SHRINKAGE = 0.9
"""Without validation records, and in evaluations while what is below is trained."""
_SCALE = 17.0
_LOG_RANGE = math.log(1000.0)
FILE = "class_means.safetensors"
"""What a checkpoint holds of it."""


@dataclass
class Read:
    """What a head reads of records.

    Attributes:
        states: φ (n, d), float32.
        labels: their classes (n,).
        keys: a number for each input (n,), by which it is known again.
    """

    states: Tensor
    labels: Tensor
    keys: Tensor


@dataclass
class Classes:
    """Sums over the records of each class: their number (C,), and their states' sum (C, d)."""

    read: Read
    counts: Tensor
    sums: Tensor
    weights: Tensor

    @classmethod
    def of(cls, read: Read, weights: Tensor) -> "Classes":
        """Those of some records, of which one of each class counts (C,)."""
        zeros = read.states.new_zeros(len(weights), read.states.shape[1])
        counts = read.labels.bincount(minlength=len(weights)).to(zeros)
        return cls(read, counts, zeros.index_add_(0, read.labels, read.states), weights)

    @cached_property
    def means(self) -> Tensor:
        """(C, d); that of all records for a class that has none."""
        of_all = self.sums.sum(0) / self.counts.sum()
        return torch.where(self.counts[:, None] > 0, self.sums / self.counts.clamp_min(1)[:, None], of_all)

    @property
    def log_shares(self) -> Tensor:
        """log π (C,); a class without a record has half a one."""
        shares = self.counts.clamp_min(0.5) * self.weights
        return (shares / shares.sum()).log()

    @property
    def known(self) -> Tensor:
        """How many records each mean is of, (C,)."""
        return torch.where(self.counts > 0, self.counts, self.counts.sum())

    @property
    def freedom(self) -> int:
        """Of the covariance within the classes; 0 where each has one record."""
        return len(self.read.states) - int((self.counts > 0).sum())

    def precision(self, shrinkage: float) -> Tensor:
        """P (d, d) of the covariance within the classes; of that of all records where each class has one."""
        return _inverse(self._covariance, shrinkage).to(self.read.states)

    @cached_property
    def _covariance(self) -> Tensor:
        centre = self.means[self.read.labels] if self.freedom else self.read.states.mean(0)
        return _covariance(self.read.states - centre, self.freedom or len(self.read.states) - 1)

    def left_out(self, count: int, shrinkage: float) -> Tensor:
        """Scores of the last ``count`` records by the means and the P of all others, (count, C) float64 on the CPU.

        One record less changes the covariance S within the classes by a matrix of rank 1 (Sherman & Morrison 1950).
        What it is shrunk towards stays.
        """
        states, means, labels = self.read.states.cpu().double(), self.means.cpu().double(), self.read.labels.cpu()
        left = max(1, self.freedom - 1)
        scatter = self.freedom / left * self._covariance  # that of all, as if one were left out
        level = self._covariance.diagonal().mean().clamp_min(1e-12)
        precision = torch.linalg.inv(
            (1 - shrinkage) * scatter + shrinkage * level * torch.eye(len(scatter), dtype=states.dtype)
        )
        x, own, counts = states[-count:], labels[-count:], self.known.cpu().double()
        n = counts[own]
        others = torch.where(n > 1, n - 1, 1)
        size = torch.where(n > 1, n / others / left, 0)  # S without x is the scatter - size · residual residualᵀ
        residual = x - means[own]
        u = residual @ precision
        within = (u * residual).sum(-1)
        weight = (1 - shrinkage) * size / (1 - (1 - shrinkage) * size * within)  # P is the precision + weight · u uᵀ
        along, of_means, of_x = u @ means.T, means @ precision, (u * x).sum(-1)
        spread = (precision * scatter).sum() - size * within
        spread += weight * ((u @ scatter * u).sum(-1) - size * within.square())  # tr PS

        def scores(product: Tensor, square: Tensor, along: Tensor, weight: Tensor, of_x: Tensor) -> Tensor:
            return product + weight * of_x * along - (square + weight * along.square()) / 2

        found = scores(x @ of_means.T, (of_means * means).sum(-1), along, weight[:, None], of_x[:, None])
        found += spread[:, None] / (2 * counts)
        mean = torch.where((n > 1)[:, None], (n[:, None] * means[own] - x) / others[:, None], states.mean(0))
        of_mean = mean @ precision
        of_own = scores((of_mean * x).sum(-1), (of_mean * mean).sum(-1), (u * mean).sum(-1), weight, of_x)
        of_own += spread / (2 * torch.where(n > 1, others, len(states)))
        return found.scatter(1, own[:, None], of_own[:, None])

    def linear(self, precision: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (C, d) and bias (C,) of the scores φᵀ P m_c − ½ (m_cᵀ P m_c − tr PS / n_c)."""
        weight = self.means @ precision
        spread = (precision.cpu().double() * self._covariance).sum().to(weight)
        return weight, (spread / self.known - (weight * self.means).sum(-1)) / 2


@dataclass
class LeftOut:
    """Training records, each by the means of all others.

    Attributes:
        logits: z (n, C) of all records, differentiable in ``states``.
        labels: of all records (n,).
        rows: which of them are the batch's, (b,).
        states: φ (b, d) of the batch, of the forward.
    """

    logits: Tensor
    labels: Tensor
    rows: Tensor
    states: Tensor

    def slopes(self, nll: Tensor) -> Tensor:
        """Of a function of the logits by the states, (b, d)."""
        return torch.autograd.grad(nll, self.states, retain_graph=True)[0]

    def expected_square(self, slopes: Tensor, weights: Tensor | float) -> Tensor:
        r"""Factor that makes the square of a record's gradient about its Hessian, (b,).

        .. math:: \|J_k^\top u\|^2 / \|g_k\|^2, \qquad u_j = \sqrt{w_j}\,(\sqrt{p_j} \circ \epsilon_j - p_j
                  \sqrt{p_j}^\top \epsilon_j), \qquad \mathbb E[u_j u_j^\top] = w_j (\mathrm{diag}(p_j) - p_j p_j^\top)

        with g_k the slopes of the sum of all records' NLL, J_k of their logits by φ_k, and signs ε. A record that is
        sure of its label still moves the others' logits: the factor by its own logits alone would be far too large.

        Args:
            slopes: g (b, d).
            weights: w, of each record (n,).
        """
        p = self.logits.detach().softmax(-1)
        root = p.sqrt() * (torch.randint_like(p, 2) * 2 - 1)
        noise = root - p * root.sum(-1, keepdim=True)
        (expected,) = torch.autograd.grad(
            self.logits,
            self.states,
            noise * torch.as_tensor(weights, device=p.device).sqrt().reshape(-1, 1),
            retain_graph=True,
        )
        size = slopes.square().sum(-1)
        return torch.where(size > 0, expected.square().sum(-1) / size, 0)


def _alone(tensor: Tensor) -> Tensor:
    return tensor


class ClassMeans:
    """What a head that isn't trained knows of the training records.

    Args:
        head: the linear layer that gives the logits; its weights take no gradient any more.
        class_weights: how much a record of each class counts, (C,); empty for 1 each.
        gather: what all processes have of a tensor (b, …), one after the other.
    """

    def __init__(
        self, head: nn.Linear, class_weights: Sequence[float] = (), gather: Callable[[Tensor], Tensor] = _alone
    ) -> None:
        self.head, self._class_weights, self._gather = head, class_weights, gather
        self.freeze()
        self._read: Read
        self._precision: Tensor
        self._sizes: Tensor
        self._log_shares: Tensor
        self._training: Read
        self._held_out: Read | None = None
        self._rows: dict[int, int]

    def freeze(self, frozen: bool = True) -> None:
        """Take the head from what is trained, or give it back."""
        for parameter in self.head.parameters():
            parameter.requires_grad_(not frozen)

    @contextmanager
    def reading(self) -> Iterator[Callable[[Tensor, Mapping[str, Any], Tensor], LeftOut]]:
        """Gives a function of the logits of the last forward inside, its batch and its labels, see `_left_out`."""
        read: list[Tensor] = []
        with hooked([(self.head.register_forward_pre_hook, lambda _, args: read.append(args[0]))]):
            yield lambda logits, inputs, labels: self._left_out(logits, read[-1], inputs, labels)

    def begin(self, batches: Iterator[Read]) -> None:
        """Take what the head reads of all training records before the first step; of copies one."""
        read = _distinct(batches)
        precision = _precision(read.states - read.states.mean(0), len(read.states) - 1, 0.5)
        self._set(read, precision, _sizes(read.states, precision))

    def write(self, folder: Path) -> None:
        """Keep it in a checkpoint."""
        write_tensors(folder / FILE, {**vars(self._read), "precision": self._precision, "sizes": self._sizes})

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: it has none, or of a training with another head.
        """
        device = self.head.weight.device
        stored = read_tensors(folder / FILE, ValueError)
        # Where a file's tensors lie in memory isn't aligned, and products of such have other roundings.
        tensors = {name: tensor.clone().to(device) for name, tensor in stored.items()}
        read = Read(*(tensors[name] for name in ("states", "labels", "keys")))
        self._set(read, tensors["precision"], tensors["sizes"])

    def set_head(self) -> None:
        """Make the head the discriminant of the records as they were last seen."""
        self._set_head(self._read, None)

    def finish(self, batches: Iterator[Read], held_out: Iterator[Read]) -> dict[str, float]:
        """Make the head the discriminant of what it reads of the training records now.

        Returns:
            ``shrinkage`` and ``scale``, and the ``nll`` of the validation records by which they were chosen, nats.
        """
        validation = [*held_out]
        self._training, self._held_out = _distinct(batches), _cat(validation) if validation else None
        return self._set_head(self._training, self._held_out)

    def join(self) -> dict[str, float]:
        """Once more of all records: those of the validation join their classes, after they have served otherwise.

        Returns:
            As `finish`, each record of the validation being left out; nothing where there is none.
        """
        if self._held_out is None or len(self._training.labels) < 2:
            return {}
        return self._set_head(_cat([self._training, self._held_out]), self._held_out, inside=True)

    def _left_out(self, logits: Tensor, read: Tensor, inputs: Mapping[str, Any], labels: Tensor) -> LeftOut:
        """What the records are by each other, now that a batch of them has new states.

        Args:
            logits: of a forward, by the head itself; they show which positions of a text it read.
            read: the head's input in it, (b, …, d).
            inputs: with ``input_ids``.
            labels: (b,).

        Raises:
            ValueError: a record wasn't there before the first step.
        """
        (slopes,) = torch.autograd.grad(logits, read, torch.ones_like(logits), retain_graph=True)
        states = mean_where_read(read, slopes).float()
        try:
            rows = [self._rows[key] for key in keys_of(inputs, labels).tolist()]
        except KeyError as error:
            raise ValueError(
                "train_dataset: a batch has an input that wasn't there before the first step; head 'class_means' needs "
                "the same inputs in each pass: leave out what changes them at random, or give head 'trained'"
            ) from error
        own = torch.tensor(rows, device=states.device)
        seen, at = self._gather(states.detach()), self._gather(own)
        last = _last(at)
        self._read.states[at[last]] = seen[last]
        self._sizes[at[last]] = _sizes(seen[last], self._precision)
        last = _last(own)
        scores = left_out(self._classes(self._read), self._precision, self._sizes, own[last], states[last])
        return LeftOut(self._scale * scores + self._log_shares, self._read.labels, own, states)

    @property
    def _scale(self) -> float:
        return _SCALE / self.head.in_features

    def _set(self, read: Read, precision: Tensor, sizes: Tensor) -> None:
        self._read, self._precision, self._sizes = read, precision, sizes
        self._log_shares = log_shares_left_out(self._classes(read))
        self._rows = {key: row for row, key in enumerate(read.keys.tolist())}

    def _classes(self, read: Read) -> Classes:
        weights = read.states.new_tensor(self._class_weights or [1.0] * self.head.out_features)
        return Classes.of(read, weights)

    @torch.no_grad()
    def _set_head(self, read: Read, held_out: Read | None, inside: bool = False) -> dict[str, float]:
        """Make it the discriminant with the lowest NLL of the held-out records, or the one without such.

        Where they are ``inside``, the last of the records, each is left out.
        """
        classes, tried = self._classes(read), []
        for shrinkage in (_SHRINKAGE,) if held_out is None else SHRINKAGES:
            weight, bias, constant = self._linear(classes, classes.precision(shrinkage))
            found: dict[str, float] = {"shrinkage": shrinkage, "scale": self._scale}
            if held_out is not None:
                ones = 1.0 if inside or constant is None else (held_out.states @ constant)[:, None]
                log_shares = ones * classes.log_shares
                if inside:
                    scores = classes.left_out(len(held_out.labels), shrinkage)
                else:
                    scores = held_out.states @ weight.T + ones * bias
                found["scale"], found["nll"] = _fit_scale(
                    scores, log_shares, held_out.labels, classes.weights, self._scale
                )
            tried.append((found, found["scale"] * weight, found["scale"] * bias + classes.log_shares, constant))
        found, weight, bias, constant = min(tried, key=lambda one: one[0].get("nll", 0.0))
        if constant is None:
            self.head.bias.copy_(bias)
        self.head.weight.copy_(weight if constant is None else weight + bias[:, None] * constant)
        return found

    def _linear(self, classes: Classes, precision: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weight (C, d) and bias (C,) of the scores, and for a head that has no bias a c (d,) with φᵀc about 1.

        Of all c with mean 1 it has the least variance within the classes.
        """
        weight, bias = classes.linear(precision)
        if self.head.bias is not None:
            return weight, bias, None
        common = classes.read.states.mean(0)
        towards = precision @ common
        return weight, bias, towards / (towards @ common)


def left_out(classes: Classes, precision: Tensor, sizes: Tensor, rows: Tensor, states: Tensor) -> Tensor:
    """Scores of all records by the means of the others, (n, C); of a class with one record, by the mean of all others.

    Args:
        classes: of all records.
        precision: P (d, d).
        sizes: φᵀPφ of all records (n,).
        rows: a batch of them (b,), none twice.
        states: of the batch (b, d), as in ``classes``; in these the scores are differentiable.
    """
    labels, moved = classes.read.labels, states - states.detach()  # 0, with the derivatives of the states
    classes = replace(classes, sums=classes.sums.index_add(0, labels[rows], moved))
    towards = classes.means @ precision
    bias = -(towards * classes.means).sum(-1) / 2
    total = classes.sums.sum(0)
    towards_total = total @ precision
    sizes = sizes.index_add(0, rows, 2 * (moved * (states.detach() @ precision)).sum(-1))

    def product(weight: Tensor) -> Tensor:  # without the derivatives of all other states, which cost as much again
        return (classes.read.states @ weight.T).index_add(0, rows, moved @ weight.detach().T)

    products = product(towards)
    counts = classes.counts[labels]
    alone = counts < 2
    # Of the sum of those among which the record is: its product with φ, and with itself.
    of_sum = torch.where(alone, product(towards_total[None])[:, 0], counts * products.gather(1, labels[:, None])[:, 0])
    squared = torch.where(alone, towards_total @ total, (-2 * bias * classes.counts.square())[labels])
    rest = torch.where(alone, len(labels), counts).sub(1).clamp_min(1)
    own = (of_sum - sizes) / rest - (squared - 2 * of_sum + sizes) / (2 * rest.square())
    return (products + bias).scatter(1, labels[:, None], own[:, None])


def log_shares_left_out(classes: Classes) -> Tensor:
    """log π of all records by the others, (n, C); of a class with one record, as if it were another's."""
    labels = classes.read.labels
    rest = (classes.counts[labels] - 1).clamp_min(1)[:, None]
    shares = classes.counts.clamp_min(0.5).expand(len(labels), -1).scatter(1, labels[:, None], rest) * classes.weights
    return (shares / shares.sum(-1, keepdim=True)).log()


def _sizes(states: Tensor, precision: Tensor) -> Tensor:
    """φᵀPφ (n,)."""
    return ((states @ precision) * states).sum(-1)


def _last(rows: Tensor) -> Tensor:
    """Where each of the rows (b,) stands last: a record may be in a batch more than once."""
    return torch.tensor([*{row: i for i, row in enumerate(rows.tolist())}.values()], device=rows.device)


def _precision(deviations: Tensor, freedom: int, shrinkage: float) -> Tensor:
    """The inverse of a covariance (d, d) that is shrunk towards a multiple of I; as the deviations are."""
    return _inverse(_covariance(deviations, freedom), shrinkage).to(deviations)


def _covariance(deviations: Tensor, freedom: int) -> Tensor:
    """(d, d) float64 on the CPU, for not every device has such numbers."""
    exact = deviations.cpu().double()
    return exact.T @ exact / max(1, freedom)


def _inverse(covariance: Tensor, shrinkage: float) -> Tensor:
    """Of a covariance that is shrunk towards a multiple of I."""
    level = covariance.diagonal().mean().clamp_min(1e-12)
    target = level * torch.eye(len(covariance), dtype=covariance.dtype)
    return torch.linalg.inv(torch.lerp(covariance, target, shrinkage)).contiguous()


def _fit_scale(
    scores: Tensor, log_shares: Tensor, labels: Tensor, weights: Tensor, usual: float
) -> tuple[float, float]:
    """The factor of scores (n, C) beside the classes' shares with the lowest NLL, and that NLL, nats."""
    scores, log_shares, weights = (tensor.cpu().double() for tensor in (scores, log_shares, weights))
    labels = labels.cpu()

    def nll(log_factor: float) -> float:
        logits = usual * math.exp(log_factor) * scores + log_shares
        return nn.functional.cross_entropy(logits, labels, weights).item()

    found = minimize_scalar(
        lambda x: len(labels) * nll(x) + x * x / 2, bounds=(-_LOG_RANGE, _LOG_RANGE), method="bounded"
    )
    return usual * math.exp(found.x), nll(found.x)


def keys_of(inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
    """A number for each input and its label, of its tokens without padding, (b,) int64 on the CPU."""
    ids = inputs["input_ids"].cpu()
    mask = inputs.get("attention_mask", torch.ones_like(ids)).cpu().bool()
    texts = zip(ids, mask, labels.tolist(), strict=True)
    digests = (hashlib.blake2b(f"{label} {row[own].tolist()}".encode(), digest_size=8) for row, own, label in texts)
    return torch.tensor([int.from_bytes(digest.digest(), "big", signed=True) for digest in digests])


def _cat(batches: Sequence[Read]) -> Read:
    return Read(*(torch.cat([getattr(batch, name) for batch in batches]) for name in ("states", "labels", "keys")))


def _distinct(batches: Iterator[Read]) -> Read:
    """All of them, of copies the first; a ValueError where one has no label."""
    read = _cat([*batches])
    if (read.labels < 0).any():
        raise ValueError(
            f"train_dataset: a label is {int(read.labels.min())}, of which head 'class_means' knows no class; leave "
            "such records out"
        )
    first: dict[int, int] = {}
    for row, key in enumerate(read.keys.tolist()):
        first.setdefault(key, row)
    rows = torch.tensor([*first.values()])
    on = rows.to(read.states.device)
    return Read(read.states[on], read.labels[on], read.keys[rows])
