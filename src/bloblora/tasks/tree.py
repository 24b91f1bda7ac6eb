"""One question with all its choices as one row: a shared prefix and a branch for each choice.

    [left padding][prefix][branch 1][branch 2] ...

A 4D attention mask lets each branch see the prefix and itself, and its positions go on from the prefix's end,
so a branch's log-likelihood is the one it has alone after the prefix, while the prefix is computed once.
A row is an example: noise drawn for each row is drawn for each question.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from bloblora.tasks.task import Batch, Example, TaskError, pad


def collate_trees(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Examples with `prefix` (ids), `branches` (ids for each choice) and `scored` (how many last ids count).

    Returns, with T the longest row, M the most branch tokens in a row and C the most choices:
        input_ids, position_ids: (b, T).
        attention_mask: (b, 1, T, T) bool, True where a query (dim 2) sees a key (dim 3).
        choice_ids: (b, M), the choice that each of the last M tokens counts for, -1 for none.
        sources: (b, M), which of the last M+1 positions predicts that token.
        choice_lengths: (b, C), scored tokens of each choice, 0 for one that the question lacks.
    """
    rows = [_pack(example) for example in examples]
    window = 1 + max(len(row["choices"]) for row in rows)
    segments = pad([row["segments"] for row in rows], -1, side="left", length=window)
    # Counted from the right, where rows are aligned, a source doesn't depend on the padding.
    sources = [[window - source for source in row["sources"]] for row in rows]
    return {
        "input_ids": pad([row["ids"] for row in rows], pad_token_id, side="left", length=window),
        "position_ids": pad([row["positions"] for row in rows], 0, side="left", length=window),
        "attention_mask": _visible(segments).unsqueeze(1),
        "choice_ids": pad([row["choices"] for row in rows], -1, side="left"),
        "sources": pad(sources, 0, side="left"),
        "choice_lengths": pad([example["scored"] for example in examples], 0, side="right"),
    }


def tree_length(example: Example) -> int:
    """Tokens of an example's row."""
    return len(example["prefix"]) + sum(map(len, example["branches"]))


def tree_log_likelihoods(model: nn.Module, batch: Batch) -> Tensor:
    """Log-likelihood of each choice's scored tokens, nats: (b, C) float32, -inf for choices it lacks."""
    check_model(model, batch)
    choice_ids, sources, lengths = batch["choice_ids"], batch["sources"], batch["choice_lengths"]
    width, window = batch["input_ids"].shape[1], choice_ids.shape[1] + 1
    dtype = extract_model_from_parallel(model).dtype
    zeros = torch.zeros_like(batch["attention_mask"], dtype=dtype)
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=zeros.masked_fill(~batch["attention_mask"], torch.finfo(dtype).min),
        position_ids=batch["position_ids"],
        # Indices, not a number: a number makes a view, for which torch multiplies by a copy of the head an example.
        logits_to_keep=torch.arange(width - window, width, device=choice_ids.device),
        use_cache=False,
    )
    logits = output.logits.float()
    targets = batch["input_ids"][:, 1 - window :]
    rows = torch.arange(len(targets), device=targets.device).unsqueeze(1)
    log_probs = logits[rows, sources, targets] - logits.logsumexp(-1).gather(1, sources)
    counts_for = choice_ids.unsqueeze(-1) == torch.arange(lengths.shape[1], device=lengths.device)
    scores = torch.where(counts_for, log_probs.unsqueeze(-1), 0).sum(1)
    return scores.masked_fill(lengths == 0, -torch.inf)


def check_model(model: nn.Module, batch: Batch) -> None:
    """Raise a TaskError when the model would ignore or change the tree's mask."""
    inner = extract_model_from_parallel(model)
    config = inner.config.get_text_config()
    advice = "use the task 'choice_letter', which needs no such mask"
    if config._attn_implementation not in ("sdpa", "eager"):
        raise TaskError(
            f"attn_implementation: '{config._attn_implementation}' takes no 4D attention mask; load the "
            f"model with attn_implementation='sdpa', or {advice}"
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or getattr(inner, "_is_stateful", False):
        found = ", ".join(sorted(kinds)) or "recurrent"
        raise TaskError(f"model: '{config.model_type}' has {found} layers, which ignore the mask; {advice}")
    window = getattr(config, "sliding_window", None)
    if window and batch["input_ids"].shape[1] > window and (longest := int(batch["position_ids"].max()) + 1) > window:
        raise TaskError(
            f"max_length: a question with its longest choice has {longest} tokens and the model's attention "
            f"window {window}; set max_length to {window} or less, or {advice}"
        )


def _pack(example: Example) -> dict[str, list[int]]:
    """One unpadded row; `sources` are counted from the row's end, 1 being its last token."""
    start = len(example["prefix"])
    ids, positions, segments = list(example["prefix"]), list(range(start)), [0] * start
    choices: list[int] = []
    sources: list[int] = []
    for choice, (branch, scored) in enumerate(zip(example["branches"], example["scored"], strict=True)):
        sources += [start - 1, *range(len(ids), len(ids) + len(branch) - 1)]
        ids += branch
        positions += range(start, start + len(branch))
        segments += [choice + 1] * len(branch)
        choices += [-1] * (len(branch) - scored) + [choice] * scored
    from_end = [len(ids) - source for source in sources]
    return {"ids": ids, "positions": positions, "segments": segments, "choices": choices, "sources": from_end}


def _visible(segments: Tensor) -> Tensor:
    """Which token sees which, (b, T, T) bool; segments (b, T): -1 padding, 0 prefix, 1.. branches."""
    query, key = segments.unsqueeze(2), segments.unsqueeze(1)
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    related = (query >= 0) & ((key == 0) | (key == query))
    # Padding sees itself: a query that sees nothing would be NaN.
    return (related & causal) | torch.eye(length, dtype=torch.bool)
