"""Texts that are given: how probable they are under weight draws, token by token, and where the draws disagree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import pad as pad_tensor
from transformers import PreTrainedTokenizerBase

from ..contexts import eval_mode, unwrapped
from ..messages import quoted
from ..prediction import Sampler
from ..prediction.forward import BatchForward
from ..prediction.prediction import check_finite, check_num_samples, sampler_of
from ..tasks import TaskError, TextGeneration
from ..tasks.choice_text import additive_mask, check_model, collate_trees
from ..tasks.encoding import pad
from .decoding import TokenSums, check_weights
from .options import decoder_start
from .tokens import TokenScores

_MOST_LOGITS = 2**25
"""Logits of a batch that are held for each draw: 128 MiB in float32, or one text's where that alone is more."""


@torch.no_grad()
def score(
    model: nn.Module,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    responses: Sequence[str] | Sequence[Sequence[int]],
    num_samples: int = 10,
    seed: int = 0,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sampler: Sampler | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> TokenScores:
    """What N weight draws say of responses that are given, token by token.

    Draw s of a seed is the same function as in `posterior_generate` and `bloblora.predict`. Each batch takes one
    forward a draw, or several draws one forward; results depend on neither the batch, its order nor its padding.
    Responses to one prompt share it: it is read once a draw, as the prefix of a tree whose branches are the responses,
    or by the encoder. Blocks below the first Bayesian layer are computed once for all draws. A model that takes no 4D
    attention mask reads the prompt with each response.

    Args:
        model: a PEFT model, Bayesian or plain, or any other of which ``sampler`` draws; decoder-only or
            encoder-decoder.
        prompts: n texts, or lists of token ids as the model is to read them.
        responses: n likewise, one of each prompt; of a text the end-of-text token is scored too, and for a decoder-only
            model a space is put before it where there is no white space, as `bloblora.tasks.TextGeneration` does.
        num_samples: N draws; 0 uses the posterior mean.
        seed: of the draws.
        tokenizer: of texts.
        sampler: where the draws come from; default the model's posterior. A plain model is one function: one draw is
            made for any N.
        batch_size: responses a forward.
        progress: show a bar.

    Returns:
        The `TokenScores` of the responses, on the CPU, in their order.

    Raises:
        ValueError: ``num_samples`` or ``batch_size`` is out of range, there is nothing to score, a prompt or a response
            is empty or has what is no token id, only one of the two is a text, texts come without a tokenizer, draws
            are no weights (a linearized Laplace), or an encoder-decoder has no token that responses start from.
        FloatingPointError: a probability is NaN.
    """
    check_num_samples(num_samples, batch_size)
    inner = unwrapped(model)
    of_encoder = bool(inner.config.is_encoder_decoder)
    vocabulary = inner.config.get_text_config().vocab_size
    pairs = [*_pairs(prompts, responses, tokenizer, of_encoder, vocabulary)]
    sampler = sampler or sampler_of(inner)
    task = _Encoded(inner) if of_encoder else _Trees(inner)
    device = next(inner.parameters()).device
    batches = [*_batches(pairs, batch_size, _MOST_LOGITS // vocabulary)]
    places: list[int] = []
    parts: list[tuple[Tensor, ...]] = []
    with eval_mode(inner):
        for rows in track(batches, "scoring", disable=not progress, console=Console(stderr=True)):
            numbers, groups = _grouped(pairs, rows, alone=not task.shares([pairs[row] for row in rows]))
            batch = {name: tensor.to(device) for name, tensor in task.collate(groups).items()}
            sums = TokenSums(batch["targets"])
            for logits in sampler.logits(_Forward(inner, batch, task), num_samples, seed):
                sums.add(logits.float())
            lengths = [len(pairs[number][1]) for number in numbers]
            found = (batch["targets"], *sums.result())
            check_finite(found[1], inner)
            parts += [*zip(*(values.cpu().split(lengths, dim=-1) for values in found), strict=True)]
            places += numbers
    width = max(len(response) for _, response in pairs)
    order = torch.tensor(places).argsort().tolist()
    names = ("tokens", "draw_log_probs", "entropies", "expected_entropies", "ranks")
    joined = {
        name: torch.stack([pad_tensor(parts[i][column], (0, width - parts[i][column].shape[-1])) for i in order], -2)
        for column, name in enumerate(names)
    }
    mask = torch.arange(width) < torch.tensor([len(response) for _, response in pairs])[:, None]
    return TokenScores(**joined, mask=mask, num_samples=num_samples)


_Pair = tuple[tuple[int, ...], tuple[int, ...]]
_Group = tuple[tuple[int, ...], list[tuple[int, ...]]]
"""A prompt, and the responses to it."""


class _Forward(BatchForward):
    """The model on a batch, by weights; an encoder-decoder has no trunk that all draws share."""

    def __call__(self, copies: int = 1) -> Tensor:
        """Logits (copies·tokens, V) of the batch, repeated."""
        check_weights()
        return super().__call__(copies)

    def share_trunk(self, layers: Iterable[str]) -> None:
        if not isinstance(self._task, _Encoded):
            super().share_trunk(layers)


@dataclass(frozen=True)
class _Trees:
    """A decoder-only model: a row is a prompt with all its responses, each of which sees the prompt and itself."""

    model: Any

    def shares(self, pairs: Sequence[_Pair]) -> bool:
        """Whether pairs can share their prompt: the model takes a tree's mask."""
        longest = torch.arange(max(len(prompt) + len(response) for prompt, response in pairs))[None]
        try:
            check_model(self.model, {"input_ids": longest, "position_ids": longest}, advice="")
        except TaskError:
            return False
        return True

    def length(self, example: _Group) -> int:
        return len(example[0]) + sum(map(len, example[1]))

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        trees = [{"prefix": p, "branches": branches, "scored": [*map(len, branches)]} for p, branches in examples]
        batch = collate_trees(trees, 0)
        if all(len(branches) == 1 for _, branches in examples):  # no tree: the usual mask, which any model takes
            width = batch["input_ids"].shape[1]
            lengths = [[1] * self.length(example) for example in examples]
            batch["attention_mask"] = pad(lengths, 0, side="left", length=width)
        counted = batch["choice_ids"] >= 0
        del batch["choice_lengths"]
        return batch | {"targets": batch["input_ids"][:, -counted.shape[1] :][counted]}

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Logits (responses' tokens, V) of a batch, in the order of its targets."""
        mask, counted = batch["attention_mask"], batch["choice_ids"] >= 0
        if mask.ndim == 4:
            mask = additive_mask(mask, self.model.dtype)
        width, window = batch["input_ids"].shape[1], counted.shape[1] + 1
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=mask,
            position_ids=batch["position_ids"],
            # Indices, not a number, for the reason given in `tree_log_likelihoods`.
            logits_to_keep=torch.arange(width - window, width, device=mask.device),
            use_cache=False,
        ).logits
        rows = torch.arange(len(counted), device=mask.device).unsqueeze(1).expand_as(counted)
        return logits[rows[counted], batch["sources"][counted]]


@dataclass(frozen=True)
class _Encoded:
    """An encoder-decoder model: the encoder reads each prompt once, the decoder each response."""

    model: Any

    def length(self, example: _Group) -> int:
        return len(example[0])

    def shares(self, pairs: Sequence[_Pair]) -> bool:
        """Whether pairs can share their prompt: always."""
        return True

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        responses = [response for _, branches in examples for response in branches]
        owners = [i for i, (_, branches) in enumerate(examples) for _ in branches]
        start = decoder_start(self.model)
        prompts = [prompt for prompt, _ in examples]
        return {
            "input_ids": pad(prompts, 0, side="right"),
            "attention_mask": pad([[1] * len(prompt) for prompt in prompts], 0, side="right"),
            "decoder_input_ids": pad([[start, *response[:-1]] for response in responses], 0, side="right"),
            "counted": pad([[1] * len(response) for response in responses], 0, side="right").bool(),
            "owners": torch.tensor(owners),
            "num_prompts": torch.tensor(len(prompts)),
            "targets": torch.tensor([token for response in responses for token in response]),
        }

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Logits (responses' tokens, V) of a batch, in the order of its targets."""
        ids, mask, owners, prompts = (batch[n] for n in ("input_ids", "attention_mask", "owners", "num_prompts"))
        states = self.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        copies = len(ids) // int(prompts)
        first = torch.arange(copies, device=ids.device) * prompts
        owners = owners + first.repeat_interleave(len(owners) // copies)
        outputs = model(
            encoder_outputs=(states[owners],),
            attention_mask=mask[owners],
            decoder_input_ids=batch["decoder_input_ids"],
            use_cache=False,
        )
        return outputs.logits[batch["counted"]]


def _pairs(
    prompts: Sequence[Any],
    responses: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase | None,
    of_encoder: bool,
    vocabulary: int,
) -> Iterator[_Pair]:
    """Token ids of each prompt and its response."""
    for name, given in (("prompts", prompts), ("responses", responses)):
        if isinstance(given, str):
            raise ValueError(f"{name}: {quoted(given)} is one text; give a list of them")
    if len(prompts) != len(responses) or not len(prompts):
        raise ValueError(f"there must be a response to each prompt, got {len(prompts)} and {len(responses)}")
    task = TextGeneration(pad_token_id=0)
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        for name, given in (("prompts", prompt), ("responses", response)):
            if not len(given) or (isinstance(given, str) and not given.strip()):
                raise ValueError(f"{name}: item {number} is {quoted(given)}, of which there is nothing to score")
        if isinstance(prompt, str) and isinstance(response, str):
            if tokenizer is None:
                raise ValueError(f"prompts: item {number} is a text; give its tokenizer, or token ids")
            if of_encoder:
                yield tuple(tokenizer(prompt)["input_ids"]), tuple(tokenizer(text_target=response)["input_ids"])
                continue
            example = task.encode({"prompt": prompt, "response": response}, tokenizer)
            prompt, response = example["prompt"], example["response"]
        elif isinstance(prompt, str) or isinstance(response, str):
            raise ValueError(f"responses: item {number} and its prompt must both be texts, or both token ids")
        yield tuple(_ids(prompt, "prompts", number, vocabulary)), tuple(_ids(response, "responses", number, vocabulary))


def _ids(given: Any, name: str, number: int, vocabulary: int) -> list[int]:
    """Token ids as a list; a ValueError where they aren't."""
    ids: list[Any] = [token.item() if isinstance(token, Tensor | np.generic) else token for token in given]
    if wrong := [token for token in ids if not (isinstance(token, int) and 0 <= token < vocabulary)]:
        raise ValueError(f"{name}: item {number}: {quoted(wrong[0])} is no token id, from 0 to {vocabulary - 1}")
    return ids


def _batches(pairs: Sequence[_Pair], batch_size: int, most_tokens: int) -> Iterator[list[int]]:
    """Pairs by their number, those of one prompt together and the longest first, within the two limits."""
    order = sorted(range(len(pairs)), key=lambda i: (-len(pairs[i][0]), pairs[i][0], -len(pairs[i][1]), i))
    batch: list[int] = []
    tokens = 0
    for number in order:
        size = len(pairs[number][1])
        if batch and (len(batch) == batch_size or tokens + size > most_tokens):
            yield batch
            batch, tokens = [], 0
        batch.append(number)
        tokens += size
    yield batch


def _grouped(pairs: Sequence[_Pair], rows: Sequence[int], alone: bool = False) -> tuple[list[int], list[_Group]]:
    """The rows in the order of their groups, and the groups."""
    by_prompt: dict[Any, list[int]] = {}
    for row in rows:
        by_prompt.setdefault(row if alone else pairs[row][0], []).append(row)
    groups = [(pairs[own[0]][0], [pairs[row][1] for row in own]) for own in by_prompt.values()]
    return [row for own in by_prompt.values() for row in own], groups
