"""Which rows of a layer's input are one example, where the layer doesn't see the batch as (b, T, n)."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "labels")


class Batch:
    """The batch of a model's last forward in train mode, for its layers: a hook that `follow` registers.

    Mixture-of-experts blocks and others flatten it to (b·T, n), an expert sees some of its tokens, and packing puts
    several texts into a row, whose position ids start again at 0.

    Attributes:
        rows: b; None before the first forward.
        tokens: b·T of each input that has tokens.
        squares: factor of the square of each example's gradient, (b,): of how many NLLs the loss is the mean, the
            labels other than -100, of tokens or examples, that the model is given, and otherwise the examples. What is
            written into it before the backward counts there. None before a layer asks for it.
        expects_labels: whether a training writes into `squares` what makes them those of the model's own labels.
        lengths: tokens of each text, where rows hold several and there is no attention mask; None elsewhere, and under
            ``torch.compile``, which can't look at them.
    """

    def __init__(self) -> None:
        self.rows: int | None = None
        self.squares: Tensor | None = None
        self.expects_labels = False
        self._labels: Any = None
        self.tokens: tuple[int, ...] = ()
        self.lengths: list[int] | None = None

    def see(self, module: nn.Module, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        """Note the shapes of the model's inputs."""
        if not module.training:
            return
        inputs = [*arguments[:1], *(options.get(name) for name in _INPUTS)]
        shapes = [value.shape[:2] for value in inputs if isinstance(value, Tensor) and value.ndim > 1]
        if shapes:
            self.rows, self.tokens = shapes[0][0], tuple(rows * length for rows, length in shapes)
            self.squares, self._labels = None, options.get("labels")
        positions = options.get("position_ids")
        # With a mask they may be those of a tree of choices, which are one example.
        packed = isinstance(positions, Tensor) and positions.ndim == 2 and options.get("attention_mask") is None
        packed &= not torch.compiler.is_compiling()
        self.lengths = _lengths(positions) if packed else None  # type: ignore[arg-type]

    def parts(self, x: Tensor, routed: bool) -> int | list[int] | None:
        """How the rows of a layer's input (..., n) are divided among draws.

        Args:
            x: the input.
            routed: whether the layer is an expert's, whose rows are tokens of any example.

        Returns:
            None: the first dimension is the example. b: equal parts of all rows. 1: all rows see one draw, for whose
            they are isn't known. Lengths of consecutive texts.
        """
        if routed and x.ndim == 2:
            return 1
        rows = x.shape[:-1].numel()
        if self.lengths is not None and rows == sum(self.lengths):
            return self.lengths
        if x.ndim != 2 or self.rows is None or rows == self.rows:
            return None
        return self.rows if rows in self.tokens else 1

    def squares_of(self, x: Tensor, parts: int | list[int] | None) -> Tensor | int:
        """Of `squares` those of the draws that `parts` says, (b,), or one number for all."""
        if self.rows is None:
            return len(x)
        if self.squares is None:
            labels = self._labels
            indices = isinstance(labels, Tensor) and not labels.is_floating_point()
            terms = (labels != -100).sum() if indices else self.rows
            self.squares = torch.ones(self.rows, device=x.device) * terms
        of_rows = len(x) == self.rows if parts is None else parts == self.rows
        return (self.squares if of_rows else self.squares[0]).to(x.device)

    def noise(self, x: Tensor, routed: bool, *shape: int) -> Tensor:
        """Standard normals for a layer's input (..., n), one draw for each of its parts: a shape that broadcasts.

        Args:
            x: the input.
            routed: as of `parts`.
            shape: of a draw.
        """
        parts = self.parts(x, routed)
        if parts is None:
            return torch.randn(len(x), *[1] * (x.ndim - 2), *shape, dtype=x.dtype, device=x.device)
        rows = x.shape[:-1].numel()
        lengths = [rows // parts] * parts if isinstance(parts, int) else parts
        draws = torch.randn(len(lengths), *shape, dtype=x.dtype, device=x.device)
        of_row = torch.arange(len(lengths), device=x.device).repeat_interleave(torch.tensor(lengths, device=x.device))
        return draws[of_row].reshape(*x.shape[:-1], *shape)


def is_routed(layer: str) -> bool:
    """Whether a layer is an expert's, by its name: what it sees are some tokens of the batch."""
    return "experts" in layer.split(".")


def follow(model: nn.Module) -> Batch:
    """The `Batch` of a model, whose forwards it sees from now on."""
    for hook in model._forward_pre_hooks.values():
        if isinstance(batch := getattr(hook, "__self__", None), Batch):
            return batch
    batch = Batch()
    model.register_forward_pre_hook(batch.see, with_kwargs=True)
    return batch


def _lengths(positions: Tensor) -> list[int] | None:
    """Of the texts in rows of position ids (b, T); None where each row is one text. Padding has zeros."""
    starts = positions == 0
    starts[:, 1:] &= positions[:, :-1] != 0
    starts[:, 0] = True
    places = [*starts.flatten().nonzero().flatten().tolist(), starts.numel()]
    return [end - start for start, end in pairwise(places)] if len(places) > len(starts) + 1 else None
