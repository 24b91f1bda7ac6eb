"""Prediction with N weight draws."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, SequentialSampler
from transformers import PreTrainedTokenizerBase

from ..adapter import Posterior, find_posterior
from ..contexts import TOKENIZING, eval_mode, unwrapped
from ..data import as_records
from ..tasks.likelihood import CATEGORICAL, likelihood_of
from .approximations import StoppingRule
from .distance import Distance
from .forward import BatchForward, PredictionTask, class_logits, output_head
from .kinds import Prediction, prediction_of
from .sampler import Forward, Point, Sampler, Tempered, WeightDraws
from .states import with_states


@torch.no_grad()
def predict(
    model: nn.Module,
    inputs: Any,
    num_samples: int = 10,
    seed: int = 0,
    *,
    task: PredictionTask | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sampler: Sampler | None = None,
    stop: StoppingRule | None = None,
    distance: Distance | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Prediction:
    """What is said of each input, averaged over draws of the weights: class probabilities, or what a task predicts.

    Draw s of a seed is one function of the input: it depends neither on the batch, its order and its padding, nor on
    how many draws follow. Torch's global generator and the model's train or eval mode stay as they are.

    Each batch draws the weights again, from the seed. Of a posterior over weights, draws share forwards where a batch
    has few tokens, forwards run side by side on a CPU, and blocks below the first Bayesian layer are computed once:
    equal to a forward a draw up to rounding, see benchmarks/prediction.py for the time.

    Several threads may predict with one model at once. It is in eval mode until the last of them is done, so no thread
    may train it meanwhile.

    Args:
        model: a PEFT model, Bayesian or plain, or any other of which ``sampler`` draws; it may be compiled or wrapped,
            but predictions are the model's own.
        inputs: encoded examples of ``task``; or, for a model whose ``logits`` are (n, C), texts with a ``tokenizer``,
            what a tokenizer returned (tensors of n rows), or a DataLoader of such batches, which is taken in its order.
        num_samples: N draws; 0 uses the posterior mean.
        seed: of the draws.
        task: collates examples and reads the logits.
        tokenizer: makes ``inputs`` of texts, or of what else `bloblora.data.as_records` makes into records with
            ``text``; what is longer than its limit is truncated.
        sampler: where the draws come from; default the model's posterior, with the temperature that
            `set_temperature` has fitted. A plain model is one function: one draw is made for any N.
        stop: when to make no more draws for an input; an approximation, which changes results.
        distance: from the training data, of what the output head reads (`hidden_states`); adds `Prediction.distances`,
            for one more forward where there are several draws.
        batch_size: inputs a forward; a DataLoader has its own.
        progress: show a bar.

    Returns:
        The `Prediction`, on the CPU, rows in the order of ``inputs``; of a task whose answers aren't classes the one of
        its likelihood, such as `ValuePrediction`.

    Raises:
        ValueError: ``num_samples`` or ``batch_size`` is out of range, there is no input, a DataLoader isn't known to
            keep the order of its data, or a tokenizer has no pad token or comes with a task, the adapter is merged; or,
            without a task, by `class_logits`.
        FloatingPointError: by `check_finite`, where a probability is NaN.
        DataError: inputs for the tokenizer are no texts.
    """
    check_num_samples(num_samples, batch_size)
    inputs, task = encoded(inputs, task, tokenizer)
    model = unwrapped(model)
    sampler = sampler or tempered_sampler_of(find_posterior(model))
    likelihood = likelihood_of(task)
    if stop is not None and likelihood.name != Prediction.kind:
        raise ValueError("stop: when no more draws are needed is known of classes that exclude each other only")
    order, rows, shares, states = order_of(inputs, task), [], [], []
    head, is_one = output_head(model) if distance else None, num_samples == 0 or sampler.is_point
    with eval_mode(model):
        for forward in forwards(model, inputs, task, order, batch_size, progress):
            size, drawn = forward.rows, None
            if head is not None:
                mean, read = with_read(head, sampler, forward, num_samples if is_one else 0, seed)
                states.append(check_finite(read, model))
                drawn = mean.float()[None] if is_one else None
            if drawn is None and (stop is None or is_one):
                drawn = draw_logits(forward, sampler, num_samples, seed)
            if drawn is not None:
                logits = likelihood.normalized(drawn).cpu()
            else:
                assert stop is not None
                logits = _stopped_log_probs(forward, sampler, num_samples, seed, stop).cpu()
            rows.append(check_finite(logits, model))
            if forward.head_shares:
                shares.append(_mean_shares(forward.head_shares, size))
    if not rows:
        raise ValueError("inputs: there is nothing to predict")
    logits = cat_draws(rows)
    share = torch.cat(shares) if shares else None
    distances = distance.scores(torch.cat(states)) if distance else {}
    if order is not None:
        back = torch.tensor(order).argsort()
        logits, share = logits[:, back], None if share is None else share[back]
        distances = {name: values[back] for name, values in distances.items()}
    return prediction_of(logits, num_samples, likelihood, share, distances or None)


def with_read(
    head: nn.Module, sampler: Sampler, forward: Forward, num_samples: int = 0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits (b, C) of the one function of a sampler, and what a head read of each input, (b, d) float32 on the CPU.

    A ValueError where the forward is without that head.
    """

    def one() -> Tensor:
        (logits,) = sampler.logits(forward, num_samples, seed)
        return logits

    logits, states = with_states(head, one)
    if states is None:
        raise ValueError("model: its output head isn't used in its forward, so that nothing is known of what it reads")
    return logits, states.float().cpu()


def encoded(
    inputs: Any, task: PredictionTask | None, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Any, PredictionTask | None]:
    """Inputs as batches are made of them, and the task that does so; of texts with a tokenizer one for these."""
    if tokenizer is None:
        return inputs, task
    if task is not None:
        raise ValueError("tokenizer and task both say how inputs become batches; leave one of them out")
    texts = _Texts(tokenizer)
    return texts.encode(inputs), texts


def average_draws(
    forward: Forward, posterior: Posterior | Sampler | None, num_samples: int = 10, seed: int = 0
) -> Tensor:
    """Logarithm of the mean probabilities over draws of the weights, for a batch that is at hand.

    Args:
        forward: returns logits (b, C); it is called once a draw, and must be the same function each time but for the
            weights, so the model must be in eval mode or have no dropout.
        posterior: whose draws, or a sampler; None for a plain model.
        num_samples: N draws; 0 uses the posterior mean.
        seed: of the draws.

    Returns:
        log of the mean of softmax(``forward()``), (b, C) float32, averaged in log space.

    Raises:
        ValueError: ``num_samples`` is negative.
    """
    check_num_samples(num_samples)
    sampler = tempered_sampler_of(posterior) if isinstance(posterior, Posterior) else sampler_of(posterior)
    return CATEGORICAL.merged(draw_logits(forward, sampler, num_samples, seed))


def check_finite(values: Tensor, model: nn.Module | None = None) -> Tensor:
    """Logits, log-probabilities or losses as they are, of any shape; -inf is the logit of a class that isn't there.

    Args:
        values: of any shape.
        model: whose they are, to say where the NaN comes from.

    Raises:
        FloatingPointError: a value is NaN or +inf; the message says what is the likely cause.
    """
    if bool((values.isnan() | values.isposinf()).any()):
        raise FloatingPointError(f"the model's answer is not a number: {_likely_cause(model)}")
    return values


def _likely_cause(model: nn.Module | None) -> str:
    weights = [] if model is None else [*model.named_parameters()]
    if (damaged := next((name for name, weight in weights if not weight.isfinite().all()), None)) is not None:
        return f"weight {damaged} isn't finite. The base model or the adapter is damaged, or its training diverged"
    if half := {weight.dtype for _, weight in weights} & {torch.float16, torch.bfloat16}:
        return f"all weights are finite, but activations overflow in {half.pop()}; use dtype float32"
    return (
        "all weights that are known are finite. Look at what the method adds to them, such as a temperature, a scale "
        "of the width or a prior precision in its files"
    )


def check_num_samples(num_samples: int, batch_size: int = 1) -> None:
    """Raise a ValueError where N is no whole number of at least 0, or a batch has no input."""
    if not isinstance(num_samples, Integral) or num_samples < 0:
        raise ValueError(f"num_samples must be 0 (the mean) or more, a whole number, got {num_samples}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")


def sampler_of(source: nn.Module | Posterior | Sampler | None) -> Sampler:
    """Draws of a posterior, or of a model's; a point where there is none."""
    if isinstance(source, nn.Module):
        source = find_posterior(source)
    if source is None:
        return Point()
    return WeightDraws(source) if isinstance(source, Posterior) else source


def tempered_sampler_of(posterior: Posterior | None) -> Sampler:
    """Draws of a posterior over its temperature, where one was fitted and the model doesn't answer without it."""
    sampler = sampler_of(posterior)
    if posterior is None or posterior.temperatures is None or posterior.is_disabled:
        return sampler
    return Tempered(sampler, *posterior.temperatures)


def draw_logits(forward: Forward, sampler: Sampler, num_samples: int, seed: int) -> Tensor:
    """(S, b, C) float32 logits of S draws: N, 1 for N = 0, or as many as there are."""
    return torch.stack([logits.float() for logits in sampler.logits(forward, num_samples, seed)])


def _mean_shares(shares: Sequence[Tensor], size: int) -> Tensor:
    """Mean over draws of the head's shares, (b, 1 + C), as long as draws were of all rows."""
    return torch.stack([share.cpu() for share in shares if len(share) == size]).mean(0)


def _stopped_log_probs(
    forward: BatchForward, sampler: Sampler, num_samples: int, seed: int, stop: StoppingRule
) -> Tensor:
    """(S, b, C) log-probabilities, in which draws that were not made for an input are -inf."""
    total, rows = forward.rows, torch.arange(forward.rows)
    looks = [*stop.looks_before(num_samples), num_samples]
    forward.limit = looks[0]
    made: list[Tensor] = []
    with closing(sampler.logits(forward, num_samples, seed)) as draws:  # type: ignore[type-var]  # a generator
        for logits in draws:
            log_probs = logits.float().log_softmax(-1).cpu()
            if len(log_probs) > len(rows):  # draws of the whole batch that share one forward
                log_probs = log_probs[rows]
            made.append(torch.full((total, log_probs.shape[-1]), -math.inf).index_copy(0, rows, log_probs))
            if len(made) != looks[0]:
                continue
            look = looks.pop(0)
            if not looks:
                break
            forward.limit = looks[0] - look
            left = ~stop.settled(torch.stack(made)[:, rows], num_samples)
            if not left.any():
                break
            rows = rows[left]
            forward.keep(left)
    return torch.stack(made)


def forwards(
    model: nn.Module,
    inputs: Sequence[Any] | Mapping[str, Tensor] | DataLoader[Any],
    task: PredictionTask | None,
    order: list[int] | None,
    batch_size: int,
    progress: bool,
) -> Iterator[BatchForward]:
    """The model on each batch of inputs, which are taken in an order, or as a DataLoader gives them."""
    device = next(model.parameters()).device
    parts = inputs if order is None else [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    for part in track(parts, "predicting", disable=not progress, console=Console(stderr=True)):
        batch = _batch(part if order is None else inputs, task, None if order is None else part)
        yield BatchForward(model, {name: tensor.to(device) for name, tensor in batch.items()}, task)


def order_of(
    inputs: Sequence[Any] | Mapping[str, Tensor] | DataLoader[Any], task: PredictionTask | None
) -> list[int] | None:
    """Order in which inputs are batched: a task's longest first, so that little is padded and memory peaks early.

    None for a DataLoader, which has made its batches.
    """
    if isinstance(inputs, DataLoader):
        _check_keeps_order(inputs)
        return None
    if task is None and not isinstance(inputs, Mapping):
        raise ValueError(
            "inputs: without a task, pass texts with tokenizer=…, what the tokenizer returned, or a DataLoader; got "
            f"{type(inputs).__name__}"
        )
    size = len(next(iter(inputs.values()), ())) if isinstance(inputs, Mapping) else len(inputs)
    if size == 0:
        raise ValueError("inputs: there is nothing to predict")
    if task is None or isinstance(inputs, Mapping):
        return list(range(size))
    return sorted(range(size), key=lambda i: -task.length(inputs[i]))


def _check_keeps_order(loader: DataLoader[Any]) -> None:
    """Raise a ValueError where a DataLoader isn't known to give its data in their order; a stream has no other."""
    if isinstance(loader.dataset, IterableDataset):
        return
    sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    while type(sampler) in (BatchSampler, BatchSamplerShard, SkipBatchSampler):  # others may shuffle their batches
        sampler = sampler.sampler if type(sampler) is BatchSampler else sampler.batch_sampler
    shares = isinstance(sampler, DistributedSampler) and not sampler.shuffle
    if not (shares or isinstance(sampler, SequentialSampler | Sequence)):
        raise ValueError(
            f"inputs: the DataLoader's {type(sampler).__name__} isn't known to keep the order of the data, so that no "
            "row could be found again; give shuffle=False, or the numbers of the rows as a list for its sampler"
        )


def _batch(inputs: Any, task: PredictionTask | None, rows: list[int] | None) -> dict[str, Tensor]:
    """Some rows of the inputs as a batch, without their labels; all rows of a batch that is one already."""
    if isinstance(inputs, Mapping):
        tensors = {name: torch.as_tensor(value) for name, value in inputs.items() if name != "labels"}
        return tensors if rows is None else {name: tensor[rows] for name, tensor in tensors.items()}
    if rows is None:
        raise ValueError(f"inputs: the DataLoader must give dicts of tensors by name, got {type(inputs).__name__}")
    assert task is not None
    return task.collate([inputs[i] for i in rows])


@dataclass(frozen=True)
class _Texts:
    """Texts to classify, as a `PredictionTask`."""

    tokenizer: PreTrainedTokenizerBase

    def __post_init__(self) -> None:
        if self.tokenizer.pad_token_id is None:
            raise ValueError("tokenizer: has no pad token; set one, for example pad_token = eos_token")

    def encode(self, source: Any) -> list[dict[str, list[int]]]:
        records = as_records(source)
        if any("text" not in record for record in records):
            raise ValueError("inputs: with a tokenizer alone they must be texts; give a task for questions and prompts")
        limited = self.tokenizer.model_max_length < 1_000_000  # one that knows no limit says so with a huge number
        with TOKENIZING:
            return [
                dict(self.tokenizer(record["text"], record.get("text_pair"), truncation=limited)) for record in records
            ]

    def length(self, example: dict[str, list[int]]) -> int:
        return len(example["input_ids"])

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        return dict(self.tokenizer.pad(list(examples), return_tensors="pt"))

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return class_logits(model, batch)


def cat_draws(rows: list[Tensor]) -> Tensor:
    """Join batches (S, b, C) with different numbers of choices, or of draws: what a batch lacks gets -inf."""
    draws, _, columns = (max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True))
    padded = [
        nn.functional.pad(row, (0, columns - row.shape[2], 0, 0, 0, draws - row.shape[0]), value=-math.inf)
        for row in rows
    ]
    return torch.cat(padded, dim=1)
