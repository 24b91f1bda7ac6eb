"""Open-ended text under weight samples, each of them one function for a whole sequence, and how far they agree."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import combinations
from typing import Any, Literal, cast

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from ..checks import check_choice, check_count
from ..contexts import eval_mode, unwrapped
from ..messages import quoted
from ..prediction import Sampler, WeightDraws
from ..prediction.prediction import check_num_samples, sampler_of
from ..prediction.sampler import Point, StackedWeights
from .asking import Entailment
from .asking import p_true as asked_p_true
from .decoding import Answers, Decoding, KeptDraws, OwnAnswers, Samples, Sampling, Step
from .options import LEAST_TEMPERATURE, check_options, decoder_start, of_one_answer, with_mask
from .scoring import score
from .tokens import TokenScores

DRAW_SCORES = ("agreement", "self_consistency", "draw_semantic_entropy")
"""The measures that compare the answers of draws."""
SAMPLE_SCORES = ("semantic_entropy", "discrete_semantic_entropy")
"""The measures that compare sampled answers."""
DecodingName = Literal["mean", "average"]
"""Whose probabilities an answer's tokens are taken from: the posterior mean's, or the average's over the draws."""
Agree = Callable[[str, str], bool]
"""Whether two answers mean the same: a symmetric relation, so of an entailment model both directions."""


def normalized(text: str) -> str:
    """The text without case, punctuation, articles and surplus white space, as SQuAD compares answers.

    Rajpurkar et al., arXiv 1606.05250. A text of articles alone keeps them, since the answer "(A)" is "a", and one of
    punctuation alone keeps all but its case and outer white space.
    """
    lower = unicodedata.normalize("NFKC", text).casefold()
    bare = "".join(character for character in lower if unicodedata.category(character)[0] != "P")
    without_articles = " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())
    return without_articles or " ".join(bare.split()) or lower.strip()


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
    """Answers to n prompts, those of each draw, and their uncertainty.

    An answer takes its tokens from the posterior mean or, where that is asked for, each from p̄_t. Either way the draws
    read it, and keep equal weights, however probable its prefix is under each. T is the number of tokens of the longest
    answer, the end-of-text token counted. Probabilities are the model's own, before temperature, top-p and penalties.
    What `TokenScores` has is of these answers.

    Attributes:
        texts: the answers, n.
        draw_texts: for each prompt the answers of the S draws, each written on its own; none where they weren't asked
            for.
        draw_tokens: those of the draws, (S, n, T'); the pad token or 0 after their end, as in ``tokens``.
        agree: whether two answers mean the same.
        prompts: texts of the prompts, n, which an `Entailment` puts before answers; empty where they aren't known.
        sampled_texts: for each prompt the M answers that were sampled; none where they weren't asked for.
        sampled_log_probs: of these the mean over tokens of log p, by the draw that wrote them, (M, n), nats.
        p_true: P(True) of the answers, (n,); None where it wasn't asked for.
    """

    texts: list[str]
    draw_texts: list[list[str]]
    draw_tokens: Tensor
    agree: Agree = same_text
    prompts: Sequence[str] = ()
    sampled_texts: Sequence[list[str]] = ()
    sampled_log_probs: Tensor | None = None
    p_true: Tensor | None = None

    @property
    def agreement(self) -> Tensor:
        """Share of pairs of draws whose answers agree, (n,); 1 for one draw."""
        return self._of_draws(lambda texts: _share_of_pairs(texts, self.agree))

    @property
    def draw_semantic_entropy(self) -> Tensor:
        """Entropy of the draws over the clusters of answers that agree, (n,), nats; each draw counts the same.

        How far the weights disagree, in [0, log S]: `discrete_semantic_entropy` of the answer that each draw writes
        by the options that the answer is written by, where the published one samples answers.
        """
        return self._of_draws(lambda texts: _entropy_of_counts(clusters(texts, self.agree)))

    @property
    def semantic_entropy(self) -> Tensor:
        r"""Entropy of sampled answers over clusters of equal meaning, weighted by their likelihood, (n,), nats.

        Kuhn, Gal & Farquhar (arXiv 2302.09664) as estimated by Farquhar et al. 2024 (Nature 630, 625-630):

        .. math:: H = -\sum_c P(c) \log P(c), \quad P(c) \propto \sum_{y \in c} \exp \frac1{|y|} \sum_t \log p(y_t \mid
            y_{<t}, x)

        with the length-normalized probabilities of M sampled answers, those that are equal counted as often as they
        came. Answer m is sampled from weight draw m mod S, so that all are from the posterior predictive, and p is that
        draw's. With a single function (N = 0, or a plain model) it is the published estimate. In [0, log M].
        """
        numbers, log_probs = self._sampled_clusters(), self.sampled_log_probs
        assert log_probs is not None
        return torch.tensor([_entropy(own, log_probs[:, row]) for row, own in enumerate(numbers)])

    @property
    def discrete_semantic_entropy(self) -> Tensor:
        """The same with each sampled answer counted once, (n,), nats: "discrete semantic entropy" of Farquhar et al."""
        return torch.tensor([_entropy_of_counts(numbers) for numbers in self._sampled_clusters()])

    @property
    def self_consistency(self) -> Tensor:
        """Share of draws in the largest cluster of answers that agree, (n,), in [1/S, 1].

        The vote of Wang et al. 2023 (arXiv 2203.11171), whose answers are sampled: here each draw writes one, and
        samples its tokens where that is asked for.
        """
        return self._of_draws(lambda texts: max(Counter(clusters(texts, self.agree)).values()) / len(texts))

    @property
    def ranked_answers(self) -> list[list[str]]:
        """For each prompt the answer, then of draws that wrote their own those that differ, the most frequent first.

        Each stands for all that agree with it; of equally frequent ones the earlier draw's is first.
        """
        ranked = []
        for row, (text, draws) in enumerate(zip(self.texts, self.draw_texts, strict=True)):
            numbers = clusters(self._compared(row, [text, *draws]), self.agree)
            others = sorted(
                Counter(number for number in numbers if number).items(), key=lambda item: (-item[1], item[0])
            )
            ranked.append([text, *(draws[numbers.index(number) - 1] for number, _ in others)])
        return ranked

    def token_ids(self) -> list[list[int]]:
        """The answers' tokens, each as long as it is."""
        return [row[kept].tolist() for row, kept in zip(self.tokens, self.mask, strict=True)]

    def scores(self) -> dict[str, Tensor]:
        """Every measure of uncertainty by its name, each (n,); those of answers that were asked for."""
        names = (*(DRAW_SCORES if len(self.draw_tokens) else ()), *(SAMPLE_SCORES if self.sampled_texts else ()))
        asked = {} if self.p_true is None else {"p_true": self.p_true}
        return super().scores() | {name: getattr(self, name) for name in names} | asked

    def _of_draws(self, score: Callable[[list[str]], float]) -> Tensor:
        if not len(self.draw_tokens):
            raise ValueError("draws: their own answers weren't asked for; ask with draws=True")
        return torch.tensor([score(self._compared(row, texts)) for row, texts in enumerate(self.draw_texts)])

    def _sampled_clusters(self) -> list[list[int]]:
        if not self.sampled_texts:
            raise ValueError("answers: none were sampled; ask for some, as with answers=10")
        return [clusters(self._compared(row, texts), self.agree) for row, texts in enumerate(self.sampled_texts)]

    def _compared(self, row: int, texts: list[str]) -> list[str]:
        """Answers to a prompt as ``agree`` takes them."""
        if isinstance(self.agree, Entailment) and self.prompts:
            return [self.agree.after(self.prompts[row], text) for text in texts]
        return texts


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
    decoding: DecodingName = "mean",
    draws: bool = False,
    answers: int = 0,
    answer_temperature: float = 1.0,
    p_true: bool = False,
    on_token: Callable[[Sequence[int], Step], None] | None = None,
    **options: Any,
) -> Generation:
    """Answers, what the draws of the weights say of them, and where that is asked for what each draw answers itself.

    By default the posterior mean writes, in the time of a plain LoRA, and the draws then read what is written, all of
    an answer in one forward (`score`). With ``decoding="average"`` each token is taken from the mean of the draws'
    probabilities, for which each of them reads each token as it comes.

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
        decoding: ``mean`` or ``average``; where there is one function alone, they are the same.
        draws: also write the answer of each draw, one by one what N answers cost.
        answers: M answers to sample for `Generation.semantic_entropy`, by M draws or by N in turns; each N of them cost
            what the draws' answers cost.
        answer_temperature: of these, at least `LEAST_TEMPERATURE`.
        p_true: also ask the model whether its answer is true, which takes a tokenizer.
        on_token: called with the rows of a batch and each `bloblora.generation.decoding.Step` of their answers, while
            they are written: under the mean alone, or under all draws where ``decoding`` is ``average``. What it raises
            ends the generation.
        **options: as for transformers' ``generate``: ``max_new_tokens``, ``do_sample``, ``temperature``, ``top_p``,
            ``repetition_penalty``, ``stopping_criteria``, ``stop_strings``, …; what is left open comes from the model's
            generation config, but for beams, several answers and the kind of cache. They act on the probabilities that
            answers are taken from, and on each draw's own for its answer; of those that change probabilities none
            acts on ``answers``.

    Returns:
        The `Generation`, on the CPU, rows in the order of ``inputs``.

    Raises:
        ValueError: an argument is out of its range, there is no prompt or one is padded on the wrong side, an option
            asks for several answers or for no cache, the sampler's draws are no weights (a linearized Laplace), the
            draws can't read what the mean has written since ``inputs`` has more than tokens or an option starts it
            from another token, or there are stop strings without a tokenizer.
    """
    _check(inputs, num_samples, batch_size, options)
    check_count("answers", answers, 0)
    if not LEAST_TEMPERATURE <= answer_temperature < math.inf:
        raise ValueError(f"answer_temperature must be at least {LEAST_TEMPERATURE}, got {answer_temperature}")
    if not callable(agree):
        raise ValueError(f"agree must be a function of two texts, got {quoted(agree)}; find_agree gives one for a name")
    if p_true and tokenizer is None:
        raise ValueError("p_true: the question to the model is a text; give the tokenizer")
    model = unwrapped(model)
    all_draws = sampler or sampler_of(model)
    by_mean = decoding == "mean" and num_samples > 0 and not isinstance(all_draws, Point)
    _check_decoding(inputs, decoding, by_mean)
    if by_mean or p_true:
        _check_start(model, options)
    inputs = with_mask(model, inputs, options)
    options = of_one_answer(model, options, tokenizer)
    # Draws are made where they write alone: the first token of the mean doesn't wait for them.
    writers = 0 if by_mean else num_samples
    writing = _kept(all_draws, writers, seed)
    sampler = _kept(all_draws, num_samples, seed) if by_mean and draws else writing
    of_answers = min(num_samples, answers)
    answering = _kept(all_draws, of_answers, seed) if answers else writing
    device = next(model.parameters()).device
    order = _order(inputs)
    starts = range(0, len(order), batch_size)
    parts, own, sampled = [], [], []
    with eval_mode(model):
        for start in track(starts, "generating", disable=not progress, console=Console(stderr=True)):
            rows = order[start : start + batch_size]
            batch = {name: tensor.to(device) for name, tensor in _batch(model, inputs, rows).items()}
            told = None if on_token is None else partial(on_token, rows)
            write: Any = partial(cast(Any, model).generate, **batch)
            by: Any = Decoding(writing, writers, seed, batch, told, draws and not by_mean)
            parts.append(write(**options, custom_generate=by))
            if draws and by_mean:
                own.append(write(**options, custom_generate=OwnAnswers(sampler, num_samples, seed, batch)))
            if answers:
                by = Sampling(answering, of_answers, seed, batch, num_answers=answers, temperature=answer_temperature)
                sampled.append(write(**options, custom_generate=by))
    found = _joined(parts, order, tokenizer, num_samples, agree)
    prompts = _prompts(inputs)
    if by_mean:
        read: dict[str, Any] = {"sampler": all_draws, "batch_size": batch_size, "progress": progress}
        found = _as_read(found, score(model, prompts, found.token_ids(), num_samples, seed, **read))
    if own:
        texts, tokens, _ = _joined_samples(own, order, tokenizer)
        found = replace(found, draw_texts=texts, draw_tokens=tokens)
    if tokenizer is not None:
        found = replace(found, prompts=tokenizer.batch_decode(prompts, skip_special_tokens=True))
    if sampled:
        texts, _, log_probs = _joined_samples(sampled, order, tokenizer)
        found = replace(found, sampled_texts=texts, sampled_log_probs=log_probs)
    if p_true and tokenizer is not None:
        asked = {"sampler": all_draws, "batch_size": batch_size, "progress": progress}
        p = asked_p_true(model, prompts, found.token_ids(), tokenizer, num_samples, seed, **asked)
        found = replace(found, p_true=p)
    return found


def _kept(sampler: Sampler, num_samples: int, seed: int) -> Sampler:
    """The same draws, not made again for each token where that costs something."""

    def kept(draws: WeightDraws) -> Sampler:
        weights = draws.weights
        return KeptDraws(weights, num_samples, seed) if isinstance(weights, StackedWeights) else draws

    return sampler.approximated(kept)


def _check(inputs: Mapping[str, Tensor], num_samples: int, batch_size: int, options: Mapping[str, Any]) -> None:
    check_num_samples(num_samples, batch_size)
    check_options(options)
    if "input_ids" not in inputs or not len(inputs["input_ids"]):
        raise ValueError("inputs: there is nothing to answer; pass what the tokenizer returned for one or more prompts")


def _check_decoding(inputs: Mapping[str, Tensor], decoding: str, by_mean: bool) -> None:
    check_choice("decoding", decoding, DecodingName)
    if by_mean and (other := sorted(inputs.keys() - {"input_ids", "attention_mask", "labels"})):
        raise ValueError(
            f"inputs: has {', '.join(other)}, and the draws read prompts of tokens alone where the mean has written; "
            "take decoding='average'"
        )


def _check_start(model: Any, options: Mapping[str, Any]) -> None:
    """Raise a ValueError where an encoder-decoder would write from another token than the draws read from."""
    if not model.config.is_encoder_decoder:
        return
    given, own = decoder_start(model, options), decoder_start(model)
    if torch.as_tensor(given).tolist() != own:
        raise ValueError(
            f"decoder_start_token_id must be {own}, of the model's generation config, from which the draws read; got "
            f"{given}: set it there, or take decoding='average' without p_true"
        )


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


def _prompts(inputs: Mapping[str, Tensor]) -> list[list[int]]:
    """Token ids of the prompts, without padding."""
    ids = torch.as_tensor(inputs["input_ids"])
    mask = torch.as_tensor(inputs.get("attention_mask", torch.ones_like(ids))).bool()
    return [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]


def _texts(tokens: Tensor, mask: Tensor, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Texts of answers (n, T); without a tokenizer their token ids."""
    rows = [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]
    if tokenizer is None:
        return [" ".join(map(str, row)) for row in rows]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def _in_order(parts: Sequence[Answers] | Sequence[Samples], order: list[int]) -> dict[str, Tensor]:
    """All batches as one in the inputs' order, (…, n, T), with 0 after the end of the shorter ones."""
    place = torch.tensor(order).argsort()
    joined: dict[str, Tensor] = {}
    for name in (field.name for field in fields(parts[0])):
        tensors = [getattr(part, name) for part in parts]
        width = max(tensor.shape[-1] for tensor in tensors)
        padded = [pad(tensor, (0, width - tensor.shape[-1])) for tensor in tensors]
        joined[name] = torch.cat(padded, dim=-2).cpu()[..., place, :]
    return joined


def _joined_samples(
    parts: Sequence[Samples], order: list[int], tokenizer: PreTrainedTokenizerBase | None
) -> tuple[list[list[str]], Tensor, Tensor]:
    """Of each prompt the texts, and of all of them tokens (M, n, T) and the mean over tokens of log p, (M, n)."""
    joined = _in_order(parts, order)
    tokens, mask = joined["tokens"], joined["mask"]
    texts = [_texts(*answer, tokenizer) for answer in zip(tokens, mask, strict=True)]
    return [*map(list, zip(*texts, strict=True))], tokens, joined["log_probs"].sum(-1) / mask.sum(-1)


def _as_read(found: Generation, scores: TokenScores) -> Generation:
    """Answers with what the draws say that have read them."""
    names = ("draw_log_probs", "entropies", "expected_entropies", "ranks", "num_samples")
    return replace(found, **{name: getattr(scores, name) for name in names})


def _joined(
    parts: Sequence[Answers],
    order: list[int],
    tokenizer: PreTrainedTokenizerBase | None,
    num_samples: int,
    agree: Agree,
) -> Generation:
    """The answers of all batches."""
    joined = _in_order(parts, order)
    draw_mask = joined.pop("draw_mask")
    of_draws = [_texts(*draw, tokenizer) for draw in zip(joined["draw_tokens"], draw_mask, strict=True)]
    return Generation(
        texts=_texts(joined["tokens"], joined["mask"], tokenizer),
        draw_texts=[*map(list, zip(*of_draws, strict=True))] or [[] for _ in order],
        **cast("dict[str, Any]", joined),
        num_samples=num_samples,
        agree=agree,
    )


def _share_of_pairs(texts: list[str], agree: Agree) -> float:
    pairs = [first == second or agree(first, second) for first, second in combinations(texts, 2)]
    return sum(pairs) / len(pairs) if pairs else 1.0


def _entropy_of_counts(numbers: list[int]) -> float:
    return _entropy(numbers, torch.zeros(len(numbers)))


def _entropy(numbers: list[int], log_weights: Tensor) -> float:
    """Entropy over clusters, whose members have their number and a weight each."""
    shares = torch.tensor(numbers).bincount(log_weights.softmax(0))
    return torch.special.entr(shares).sum().item()
