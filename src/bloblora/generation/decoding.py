"""Decoding for transformers' ``generate``: one answer by the mean of the draws, and one of each draw."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, GenerationConfig

from ..adapter import UnevenPartsError
from ..prediction import Sampler
from ..prediction.forward import repeat_rows
from ..prediction.prediction import check_finite
from ..prediction.sampler import Forward, StackedWeights

_MOST_TOKENS = 8192
"""Prompt tokens, over draws, that are read in one forward: what it takes of memory."""


@dataclass(frozen=True)
class Answers:
    """What has been written for b prompts: the tensors of `Generation`, and which tokens belong to answers."""

    tokens: Tensor
    mask: Tensor
    draw_tokens: Tensor
    draw_mask: Tensor
    draw_log_probs: Tensor
    entropies: Tensor
    expected_entropies: Tensor
    ranks: Tensor


@dataclass(frozen=True)
class Samples:
    """M answers to each of b prompts, (M, b, T): which tokens belong to them, and log p of each by who wrote it."""

    tokens: Tensor
    mask: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class Step:
    """A token of each of b answers, as it is written.

    Attributes:
        tokens: (b,); the pad token where an answer has ended.
        running: (b,) bool, which tokens belong to answers.
        logits: of the draws, (S, b, V).
        log_probs: log p_s of the tokens, (S, b), nats.
        entropies, expected_entropies: H[p̄] and the mean of H[p_s], (b,), nats.
    """

    tokens: Tensor
    running: Tensor
    logits: Tensor
    log_probs: Tensor
    entropies: Tensor
    expected_entropies: Tensor


@dataclass(frozen=True)
class Decoding:
    """A decoding method for transformers' ``generate``, which prepares what it is called with.

    Attributes:
        sampler, num_samples, seed: of the draws.
        batch: the prompts.
        on_token: called with each `Step` of the answers that all draws write.
        draws: also write the answer of each draw; S is 0 in those tensors otherwise.
    """

    sampler: Sampler
    num_samples: int
    seed: int
    batch: Mapping[str, Tensor]
    on_token: Callable[[Step], None] | None = None
    draws: bool = False

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Callable[[Tensor, Tensor], Tensor],
        stopping_criteria: Callable[[Tensor, Any], Tensor],
        generation_config: GenerationConfig,
        **arguments: Any,
    ) -> Answers | Samples:
        """The answers that all draws write, and those of each; of the others theirs alone."""
        if len(input_ids) != (rows := len(self.batch["input_ids"])):
            raise ValueError(f"generate has made {len(input_ids)} rows of {rows} prompts; each must have one answer")
        prompts, logits = self._read(model, input_ids, arguments)
        how: dict[str, Any] = dict(processors=logits_processor, criteria=stopping_criteria, config=generation_config)
        return self._write(prompts.read, logits, partial(_Writer, prompt=input_ids, **how))

    def _write(self, read: list[_Sequences], logits: Tensor, writer: _NewWriter) -> Answers | Samples:
        writers = [*map(writer, self._noises(1 + len(logits) * self.draws))]
        scores = self._write_averaged(writers[0], [part.copy() for part in read], logits)
        if self.draws:
            self._write_own(writers[1:], read, logits)
        (tokens, mask), *own = (one.answer() for one in writers)
        own = own or [(tokens[:, :0], mask[:, :0])]
        draw_tokens, draw_masks = (torch.stack(parts) for parts in zip(*own, strict=True))
        if not self.draws:
            draw_tokens, draw_masks = draw_tokens[:0], draw_masks[:0]
        of_tokens = (torch.stack(parts, dim=-1) * mask for parts in zip(*scores, strict=True))
        return Answers(tokens, mask, draw_tokens, draw_masks, *of_tokens)

    def _noises(self, count: int) -> list[np.random.SeedSequence]:
        """Of the answer, and of each draw's own."""
        # Seeded apart from the weights, whose generator takes the seed itself.
        return np.random.SeedSequence([self.seed, 1]).spawn(count)

    def _read(self, model: Any, input_ids: Tensor, arguments: dict[str, Any]) -> tuple[_Prompts, Tensor]:
        """The prompts, once read, and the logits (S, b, V) that follow them."""
        prompts = _Prompts(model, input_ids, arguments, self.batch)
        try:
            return prompts, self._logits(prompts)
        except UnevenPartsError:
            prompts = _Prompts(model, input_ids, arguments, self.batch, together=1)
            return prompts, self._logits(prompts)

    def _write_averaged(self, writer: _Writer, read: list[_Sequences], logits: Tensor) -> list[tuple[Tensor, ...]]:
        """Write one answer that all draws read; `_token_scores` of each token."""
        scores: list[tuple[Tensor, ...]] = []
        while True:
            running, token = writer.running, writer.write(logits)
            scores.append(_token_scores(logits, token))
            if self.on_token:
                self.on_token(Step(token, running, logits, *scores[-1][:3]))
            if not writer.running.any():
                return scores
            logits = self._logits(_Step(read, [writer] * len(logits)))

    def _write_own(self, writers: list[_Writer], read: list[_Sequences], logits: Tensor) -> None:
        """Write an answer a draw."""
        while True:
            for writer, own in zip(writers, logits.split(1), strict=True):
                writer.write(own)
            if not any(writer.running.any() for writer in writers):
                return
            logits = self._logits(_Step(read, writers))

    def _logits(self, forward: _Reader) -> Tensor:
        """Logits (S, b, V) of all draws."""
        logits = torch.stack([*self.sampler.logits(forward, self.num_samples, self.seed)])
        check_finite(logits.logsumexp(-1), forward.model)
        return logits


@dataclass(frozen=True)
class Sampling(Decoding):
    """Samples answers: the m-th of draw m mod S, by its own probabilities, which no other option changes.

    Attributes:
        num_answers: M.
        temperature: that its logits are divided by.
    """

    num_answers: int = 1
    temperature: float = 1.0

    def _write(self, read: list[_Sequences], logits: Tensor, writer: _NewWriter) -> Samples:
        passes = -(-self.num_answers // len(logits))
        # Seeded apart from the weights and from the answers of `Decoding`.
        noises = np.random.SeedSequence([self.seed, 2]).spawn(passes * len(logits))
        sampling = partial(writer, processors=lambda _, scores: scores / self.temperature, do_sample=True)
        writers = [*map(sampling, noises)]
        for start in range(0, len(writers), len(logits)):
            self._write_own(writers[start : start + len(logits)], [part.copy() for part in read], logits)
        return _samples(writers[: self.num_answers])


@dataclass(frozen=True)
class OwnAnswers(Decoding):
    """The answer of each draw alone, as `Decoding` writes it beside the averaged one."""

    def _write(self, read: list[_Sequences], logits: Tensor, writer: _NewWriter) -> Samples:
        writers = [*map(writer, self._noises(1 + len(logits))[1:])]
        self._write_own(writers, read, logits)
        return _samples(writers)


class KeptDraws(Sampler):
    """Draws of a posterior, made once however often they are asked for: for every token. Several share a forward."""

    def __init__(self, weights: StackedWeights, num_samples: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._weights, self._samples = weights, [weights.sample(generator) for _ in range(num_samples)]

    def logits(self, forward: Forward, num_samples: int, seed: int) -> Iterator[Tensor]:
        """Logits of the draws; ``forward`` is a step of `Decoding`."""
        assert isinstance(forward, _Reader)
        if not self._samples:
            with self._weights.mean():
                logits = forward()
            yield logits
        for start in range(0, len(self._samples), forward.together):
            samples = self._samples[start : start + forward.together]
            with self._weights.stacked(samples, len(samples) * forward.rows):
                logits = forward(len(samples))
            yield from logits.unflatten(0, (len(samples), -1))


class _Reader(ABC):
    """A forward that reads on in b sequences, for one draw or several at once.

    Attributes:
        model: that reads.
        rows: b.
        together: most draws a call.
    """

    model: Any
    rows: int
    together: int

    def __call__(self, draws: int = 1) -> Tensor:
        """Logits (draws·b, V) of the next token, by the weights in force for each of so many equal parts."""
        check_weights()
        return self.next_logits(draws)

    @abstractmethod
    def next_logits(self, draws: int) -> Tensor:
        """The same, unchecked."""


class _Prompts(_Reader):
    """Reads the prompts; ``read`` then holds what goes on from them."""

    def __init__(
        self,
        model: Any,
        tokens: Tensor,
        arguments: dict[str, Any],
        batch: Mapping[str, Tensor],
        together: int | None = None,
    ) -> None:
        self.model, self._tokens, self._arguments, self._batch = model, tokens, arguments, batch
        self.rows, self.together = len(tokens), together or max(1, _MOST_TOKENS // batch["input_ids"].numel())
        self.read: list[_Sequences] = []

    def next_logits(self, draws: int) -> Tensor:
        arguments = {name: repeat_rows(value, draws) for name, value in self._arguments.items()}
        if self.model.config.is_encoder_decoder:
            names = ("input_ids", "attention_mask")
            given = {name: repeat_rows(self._batch[name], draws) for name in names if name in self._batch}
            arguments["encoder_outputs"] = self.model.get_encoder()(**given)
        sequences = _Sequences(self.model, repeat_rows(self._tokens, draws), arguments)
        logits = sequences.logits()
        self.read.append(sequences)
        return logits


class _Step(_Reader):
    """Reads the last token that a draw's writer has written."""

    def __init__(self, read: Sequence[_Sequences], writers: Sequence[_Writer]) -> None:
        self.model, self._pending, self._writers = read[0].model, iter(read), iter(writers)
        self.rows = len(writers[0].tokens)
        self.together = len(read[0].tokens) // self.rows

    def next_logits(self, draws: int) -> Tensor:
        sequences = next(self._pending)
        sequences.tokens = torch.cat([writer.tokens for writer in islice(self._writers, draws)])
        return sequences.logits()


class _Sequences:
    """Sequences of which a part has been read, and its cache."""

    def __init__(self, model: Any, tokens: Tensor, arguments: dict[str, Any], is_new: bool = True) -> None:
        self.model, self.tokens, self._is_new = model, tokens, is_new
        self._arguments = {k: copy.deepcopy(v) if isinstance(v, Cache) else v for k, v in arguments.items()}

    def copy(self) -> _Sequences:
        """The same with a cache of its own."""
        return _Sequences(self.model, self.tokens, self._arguments, self._is_new)

    def logits(self) -> Tensor:
        """Logits of the next token, float32; reads all that is new in ``tokens``."""
        inputs = self.model.prepare_inputs_for_generation(
            self.tokens,
            next_sequence_length=None if self._is_new else 1,
            is_first_iteration=self._is_new,
            **self._arguments,
        )
        outputs = self.model(**inputs, return_dict=True)
        self._is_new = False
        self._arguments = self.model._update_model_kwargs_for_generation(
            outputs, self._arguments, is_encoder_decoder=self.model.config.is_encoder_decoder
        )
        return outputs.logits[:, -1].float()


class _Writer:
    """Chooses the tokens of a batch of answers, each row until its end."""

    def __init__(
        self,
        noise: np.random.SeedSequence,
        prompt: Tensor,
        processors: Callable[[Tensor, Tensor], Tensor],
        criteria: Callable[[Tensor, Any], Tensor],
        config: GenerationConfig,
        do_sample: bool | None = None,
    ) -> None:
        self.tokens, self._start = prompt, prompt.shape[1]
        self._processors, self._criteria, self._padding = processors, criteria, config._pad_token_tensor
        self._do_sample = config.do_sample if do_sample is None else do_sample
        self._generator = torch.Generator().manual_seed(int(noise.generate_state(1)[0]))
        self._mask: list[Tensor] = []
        self._log_probs: list[Tensor] = []
        self.running = torch.ones(len(prompt), dtype=torch.bool, device=prompt.device)

    def write(self, logits: Tensor) -> Tensor:
        """The next token (b,) by the mean probabilities of draws, whose logits are (S, b, V)."""
        log_mean = torch.logsumexp(logits.log_softmax(-1), dim=0) - math.log(len(logits))
        # As large as logits, since a repetition penalty isn't indifferent to a shift: one draw is as in `generate`.
        scores = self._processors(self.tokens, log_mean + logits.logsumexp(-1).mean(0).unsqueeze(-1))
        if self._do_sample:
            # Gumbel noise; the same for all rows, so that none depends on its place in the batch
            uniform = torch.rand(scores.shape[-1], generator=self._generator, dtype=torch.float64)
            scores = scores - (-uniform.log()).log().to(scores)
        token = scores.argmax(-1)
        if self._padding is not None:
            token = token.where(self.running, self._padding)
        self._mask.append(self.running)
        self._log_probs.append(log_mean.gather(-1, token.unsqueeze(-1)).squeeze(-1))
        self.tokens = torch.cat([self.tokens, token.unsqueeze(-1)], dim=-1)
        self.running = self.running & ~self._criteria(self.tokens, None)
        return token

    def answer(self) -> tuple[Tensor, Tensor]:
        """Tokens without the prompt, (b, T), and which belong to the answer."""
        return self.tokens[:, self._start :], torch.stack(self._mask, dim=-1)

    @property
    def log_probs(self) -> Tensor:
        """log p̄ of the answer's tokens, before temperature and the like, (b, T); 0 after its end."""
        return torch.stack(self._log_probs, dim=-1) * torch.stack(self._mask, dim=-1)


def check_weights() -> None:
    """Raise a ValueError in the forward of a sampler that differentiates it, where others are in ``no_grad``."""
    if torch.is_grad_enabled():
        raise ValueError("sampler: its draws are linearized, no weights that read or write; take another method")


def _samples(writers: Sequence[_Writer]) -> Samples:
    """What they have written, with 0 after the end of the shorter ones."""
    written = [(*one.answer(), one.log_probs) for one in writers]
    width = max(tokens.shape[-1] for tokens, *_ in written)
    padded = ((pad(part, (0, width - part.shape[-1])) for part in parts) for parts in written)
    return Samples(*(torch.stack(parts) for parts in zip(*padded, strict=True)))


_NewWriter = partial[_Writer]
"""Of noise, for the same prompts."""


def _token_scores(logits: Tensor, token: Tensor) -> tuple[Tensor, ...]:
    """log p_s (S, b) of a token, H[p̄] (b,), the mean of H[p_s] (b,), and the token's rank (b,), of logits (S, b, V)."""
    sums = TokenSums(token)
    for of_draw in logits:
        sums.add(of_draw)
    return sums.result()


class TokenSums:
    """What is kept of the draws' logits (b, V) for b tokens, one draw after the other."""

    def __init__(self, tokens: Tensor) -> None:
        self._tokens, self._log_probs = tokens.unsqueeze(-1), list[Tensor]()
        self._probs: Tensor | float = 0.0
        self._entropies: Tensor | float = 0.0

    def add(self, logits: Tensor) -> None:
        """The next draw."""
        log_probs = logits.log_softmax(-1)
        probs = log_probs.exp()
        self._log_probs.append(log_probs.gather(-1, self._tokens).squeeze(-1))
        self._entropies = self._entropies + torch.special.entr(probs).sum(-1)
        self._probs = self._probs + probs

    def result(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log p_s of the tokens (S, b), H[p̄] (b,), the mean of H[p_s] (b,), and ranks from 1 under p̄ (b,)."""
        draws = len(self._log_probs)
        mean = torch.as_tensor(self._probs / draws)
        ranks = 1 + (mean > mean.gather(-1, self._tokens)).sum(-1)
        expected = torch.as_tensor(self._entropies / draws)
        return torch.stack(self._log_probs), torch.special.entr(mean).sum(-1), expected, ranks
