"""Open-ended text under weight samples, each of them one function for a whole sequence, and how far they agree."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import combinations
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from ..contexts import eval_mode
from ..prediction import Sampler, WeightDraws
from ..prediction.prediction import check_num_samples, sampler_of
from ..prediction.sampler import StackedWeights
from .decoding import Answers, Decoding, KeptDraws, Step
from .tokens import TokenScores

DRAW_SCORES = ("agreement", "self_consistency", "semantic_entropy")
"""The measures that compare the answers of draws."""
Agree = Callable[[str, str], bool]
"""Whether two answers mean the same: a symmetric relation, so of an entailment model both directions."""


def normalized(text: str) -> str:
    """The text without case, punctuation, articles and surplus white space, as SQuAD compares answers.

    Rajpurkar et al., arXiv 1606.05250. A text of which nothing is left keeps all but its case and outer white space.
    """
    lower = unicodedata.normalize("NFKC", text).casefold()
    bare = "".join(character for character in lower if unicodedata.category(character)[0] != "P")
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split()) or lower.strip()


def same_text(first: str, second: str) -> bool:
    """Whether two texts are equal once `normalized`."""
    return normalized(first) == normalized(second)


def clusters(texts: Sequence[str], agree: Agree = same_text) -> list[int]:
    """Number of the cluster of each text, from 0 in order of first appearance.

    A text joins the first cluster whose first text it agrees with (Kuhn, Gal & Farquhar, arXiv 2302.09664).
    """
    firsts: list[str] = []
    found = []
    for text in texts:
        number = next((i for i, first in enumerate(firsts) if first == text or agree(first, text)), len(firsts))
        if number == len(firsts):
            firsts.append(text)
        found.append(number)
    return found


@dataclass(frozen=True, kw_only=True)
class Generation(TokenScores):
    """Answers to n prompts: of the averaged model and of each draw, with their uncertainty.

    The averaged answer takes each token from p̄_t. The draws keep equal weights, however probable its prefix is under
    each. T is the number of tokens of the longest answer, the end-of-text token counted. Probabilities are the model's
    own, before temperature, top-p and penalties. What `TokenScores` has is of the averaged answers.

    Attributes:
        texts: the averaged answers, n.
        draw_texts: for each prompt the answers of the S draws, each written on its own; none where they weren't asked
            for.
        draw_tokens: those of the draws, (S, n, T'); the pad token or 0 after their end, as in ``tokens``.
        agree: whether two answers mean the same.
    """

    texts: list[str]
    draw_texts: list[list[str]]
    draw_tokens: Tensor
    agree: Agree = same_text

    @property
    def agreement(self) -> Tensor:
        """Share of pairs of draws whose answers agree, (n,); 1 for one draw."""
        return self._of_draws(lambda texts: _share_of_pairs(texts, self.agree))

    @property
    def semantic_entropy(self) -> Tensor:
        """Entropy of the draws over the clusters of answers that agree, (n,), nats; each draw counts the same.

        The discrete form of Farquhar et al. 2024 (Nature 630, 625-630); in [0, log S].
        """
        return self._of_draws(lambda texts: _entropy_of_counts(clusters(texts, self.agree)))

    @property
    def self_consistency(self) -> Tensor:
        """Share of draws in the largest cluster of answers that agree, (n,), in [1/S, 1].

        The vote of Wang et al. 2023 (arXiv 2203.11171), whose answers are sampled: here each draw writes one, and
        samples its tokens where that is asked for.
        """
        return self._of_draws(lambda texts: max(Counter(clusters(texts, self.agree)).values()) / len(texts))

    @property
    def ranked_answers(self) -> list[list[str]]:
        """For each prompt the averaged answer, then those of draws that say something else, the most frequent first.

        Each stands for all that agree with it; of equally frequent ones the earlier draw's is first.
        """
        ranked = []
        for text, draws in zip(self.texts, self.draw_texts, strict=True):
            numbers = clusters([text, *draws], self.agree)
            others = sorted(
                Counter(number for number in numbers if number).items(), key=lambda item: (-item[1], item[0])
            )
            ranked.append([text, *(draws[numbers.index(number) - 1] for number, _ in others)])
        return ranked

    def scores(self) -> dict[str, Tensor]:
        """Every measure of uncertainty by its name, each (n,); those of draws' answers where these were written."""
        if not len(self.draw_tokens):
            return super().scores()
        return super().scores() | {name: getattr(self, name) for name in DRAW_SCORES}

    def _of_draws(self, score: Callable[[list[str]], float]) -> Tensor:
        return torch.tensor([score(texts) for texts in self.draw_texts])


@torch.no_grad()
def posterior_generate(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    num_samples: int = 10,
    seed: int = 0,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sampler: Sampler | None = None,
    agree: Agree = same_text,
    batch_size: int = 16,
    progress: bool = False,
    draws: bool = True,
    on_token: Callable[[Sequence[int], Step], None] | None = None,
    **options: Any,
) -> Generation:
    """Answers by the mean of the draws' next-token probabilities, and the answers of each draw.

    Draw s of a seed is one function for a whole sequence, with a key-value cache of its own: it depends neither on the
    batch, its order and its padding, nor on how many draws follow. The same holds for sampled tokens: equal prompts get
    equal answers, and another seed others. Torch's global generator and the model's train or eval mode stay as they
    are. Each prompt is read once a draw.

    Args:
        model: a PEFT model, Bayesian or plain, or any other of which ``sampler`` draws; decoder-only or
            encoder-decoder.
        inputs: what a tokenizer returned (tensors of n rows), padded on the left for a decoder-only model.
        num_samples: N draws; 0 uses the posterior mean.
        seed: of the draws, and of sampled tokens.
        tokenizer: makes texts of answers; without it a text is its token ids, and draws agree where all ids are equal.
        sampler: where the draws come from; default the model's posterior. A plain model is one function: one draw is
            made for any N.
        agree: whether two answers mean the same; default, equal but for case, punctuation, articles and white space.
        batch_size: prompts a forward.
        progress: show a bar.
        draws: also write the answer of each draw.
        on_token: called with the rows of a batch and each `bloblora.generation.decoding.Step` of their averaged
            answers, while they are written; what it raises ends the generation.
        **options: as for transformers' ``generate``: ``max_new_tokens``, ``do_sample``, ``temperature``, ``top_p``,
            ``repetition_penalty``, ``stopping_criteria``, …; what is left open comes from the model's generation
            config. They act on the averaged probabilities, and on each draw's own for its answer.

    Returns:
        The `Generation`, on the CPU, rows in the order of ``inputs``.

    Raises:
        ValueError: ``num_samples`` or ``batch_size`` is out of range, there is no prompt or one is padded on the wrong
            side, an option asks for several answers, or the sampler's draws are no weights (a linearized Laplace).
    """
    _check(inputs, num_samples, batch_size, options)
    sampler = _kept(sampler or sampler_of(model), num_samples, seed)
    device = next(model.parameters()).device
    order = _order(inputs)
    starts = range(0, len(order), batch_size)
    parts = []
    with eval_mode(model):
        for start in track(starts, "generating", disable=not progress, console=Console(stderr=True)):
            rows = order[start : start + batch_size]
            batch = {name: tensor.to(device) for name, tensor in _batch(model, inputs, rows).items()}
            told = None if on_token is None else partial(on_token, rows)
            decoding: Any = Decoding(sampler, num_samples, seed, batch, told, draws)
            parts.append(model.generate(**batch, **options, use_cache=True, custom_generate=decoding))  # type: ignore[operator]
    return _joined(parts, order, tokenizer, num_samples, agree)


def _kept(sampler: Sampler, num_samples: int, seed: int) -> Sampler:
    """The same draws, not made again for each token where that costs something."""

    def kept(draws: WeightDraws) -> Sampler:
        weights = draws.weights
        return KeptDraws(weights, num_samples, seed) if isinstance(weights, StackedWeights) else draws

    return sampler.approximated(kept)


def _check(inputs: Mapping[str, Tensor], num_samples: int, batch_size: int, options: Mapping[str, Any]) -> None:
    check_num_samples(num_samples)
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    for name in ("num_beams", "num_return_sequences"):
        if (value := options.get(name, 1)) != 1:
            raise ValueError(f"{name} must be 1, got {value}: there is one averaged answer, and one of each draw")
    if "input_ids" not in inputs or not len(inputs["input_ids"]):
        raise ValueError("inputs: there is nothing to answer; pass what the tokenizer returned for one or more prompts")


def _order(inputs: Mapping[str, Tensor]) -> list[int]:
    """Order in which prompts are batched: the longest first, so that little is padded."""
    if "attention_mask" not in inputs:
        return list(range(len(inputs["input_ids"])))
    return torch.as_tensor(inputs["attention_mask"]).sum(-1).argsort(descending=True, stable=True).tolist()


def _batch(model: Any, inputs: Mapping[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    """Some rows, without columns that pad all of them."""
    batch = {name: torch.as_tensor(value)[rows] for name, value in inputs.items() if name != "labels"}
    if (mask := batch.get("attention_mask")) is None:
        return batch
    if not model.config.is_encoder_decoder and (ended := (mask[:, -1] == 0).nonzero()).numel():
        raise ValueError(
            f"inputs: row {rows[int(ended[0])]} of attention_mask ends in padding, where this model would write on; "
            "tokenize with padding_side='left'"
        )
    width, used = mask.shape[1], mask.any(0)
    return {name: tensor[:, used] if tensor.shape[1:] == (width,) else tensor for name, tensor in batch.items()}


def _joined(
    parts: Sequence[Answers],
    order: list[int],
    tokenizer: PreTrainedTokenizerBase | None,
    num_samples: int,
    agree: Agree,
) -> Generation:
    """All batches as one in the inputs' order, with 0 after the end of the shorter ones."""

    def texts(tokens: Tensor, mask: Tensor) -> list[str]:
        rows = [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]
        if tokenizer is None:
            return [" ".join(map(str, row)) for row in rows]
        return tokenizer.batch_decode(rows, skip_special_tokens=True)

    place = torch.tensor(order).argsort()
    joined: dict[str, Tensor] = {}
    for name in (field.name for field in fields(Answers)):
        tensors = [getattr(part, name) for part in parts]
        width = max(tensor.shape[-1] for tensor in tensors)
        padded = [pad(tensor, (0, width - tensor.shape[-1])) for tensor in tensors]
        joined[name] = torch.cat(padded, dim=-2).cpu()[..., place, :]
    draw_mask = joined.pop("draw_mask")
    of_draws = [texts(*draw) for draw in zip(joined["draw_tokens"], draw_mask, strict=True)]
    return Generation(
        texts=texts(joined["tokens"], joined["mask"]),
        draw_texts=[*map(list, zip(*of_draws, strict=True))] or [[] for _ in order],
        **joined,
        num_samples=num_samples,
        agree=agree,
    )


def _share_of_pairs(texts: list[str], agree: Agree) -> float:
    pairs = [first == second or agree(first, second) for first, second in combinations(texts, 2)]
    return sum(pairs) / len(pairs) if pairs else 1.0


def _entropy_of_counts(numbers: list[int]) -> float:
    shares = torch.tensor(numbers).bincount() / len(numbers)
    return torch.special.entr(shares).sum().item()
