"""A trained run and its predictions."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .. import models, tasks
from ..data import as_records, unanswered
from ..decision import Correctness, Decision
from ..generation import Generation, TokenScores, posterior_generate, score
from ..generation.asking import question_length
from ..generation.options import option
from ..methods import Method
from ..prediction import Distance, Prediction, Sampler, StoppingRule, Tempered, hidden_states, predict
from ..quantized import dequantize
from .approximation import Approximation
from .checks import check_sharded, head_of
from .config import RunConfig, RunError
from .distance import open_distance
from .folder import RunDescription, known_of, open_run
from .processes import processes, shard, sharded
from .texts import needs_draws, response_examples, text_lines


@dataclass(frozen=True, kw_only=True)
class CodeOptions:
    """Whether a base model's own code is run: an option of all commands that load one."""

    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run the Python code that the base model comes with, where it needs some; never stored."},
    )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(CodeOptions):
    """Which weight samples a run takes: options of all commands that predict, write or score.

    Raises:
        RunError: one is out of its range; the message lists all.
    """

    samples: int = field(default=10, metadata={"help": "Weight samples N; 0 is the posterior mean."})
    seed: int = field(default=0, metadata={"help": "Of the weight samples."})
    batch_size: int = field(default=32, metadata={"help": "Inputs a forward pass."})

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise RunError("\n".join(problems))

    def problems(self) -> list[str]:
        """What is out of its range, and what would be right."""
        problems = [f"samples must be 0 (the mean) or more, got {self.samples}"] if self.samples < 0 else []
        problems += [f"batch_size must be at least 1, got {self.batch_size}"] if self.batch_size < 1 else []
        return problems + ([f"seed must be in 0..2^32 - 1, got {self.seed}"] if not 0 <= self.seed < 2**32 else [])

    def how(self) -> dict[str, Any]:
        """What results depend on."""
        return {"num_samples": self.samples, "seed": self.seed}


@dataclass(frozen=True, kw_only=True)
class PredictionOptions(SamplingOptions):
    """How a run predicts: options of all commands that do.

    Raises:
        RunError: one is out of its range; the message lists all.
    """

    approximate: str | None = field(
        default=None,
        metadata={
            "help": "Save forward passes, at some loss (docs/cost.md): `mirrored` (samples in pairs about the mean, of "
            "which 2 do what several do), `linearized` (two passes, for any N), `top-blocks:K` (samples in the last K "
            "blocks only), `stop` (no more samples for an input whose answer is settled; `stop:ERROR:TOLERANCE`), or "
            "`mirrored-stop` (both; try it with N = 4)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.approximation  # noqa: B018  # raises for a name that is none

    @property
    def approximation(self) -> Approximation | None:
        """What ``approximate`` names."""
        return None if self.approximate is None else Approximation.parse(self.approximate)

    def check(self, method: Method, task: tasks.Task) -> None:
        """Raise a RunError where a method or a task can't predict like this: known before a model is loaded."""
        if self.approximation:
            self.approximation.check(method, task)

    def how(self) -> dict[str, Any]:
        """What predictions depend on."""
        return super().how() | {"approximate": self.approximate}


@dataclass
class Run:
    """A trained run, ready to predict.

    Attributes:
        model: the model, in eval mode: a PEFT model but for full fine-tuning.
        tokenizer: its tokenizer.
        task: how records become logits.
        sampler: where the method's draws come from.
        config: the configuration that it was trained with.
        method: its method.
        training: what the training took: ``seconds`` (of all sessions, without what a stop threw away),
            ``peak_memory_bytes`` (of the last session), ``final`` (the last log).
        adapter_sha256: of the trained weights' file.
        approximation: how `predict` saves forwards; None for all draws.
        distance: of what the head reads from the training data, which predictions then have; None where that was never
            fitted (`fit_distance`).
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    task: tasks.Task
    sampler: Sampler
    config: RunConfig
    method: Method
    training: dict[str, Any] = field(default_factory=dict)
    adapter_sha256: str | None = None
    approximation: Approximation | None = None
    distance: Distance | None = None

    @property
    def scales(self) -> dict[str, float]:
        """``temperature``, ``temperature_of_mean`` and ``width``, T and τ, where they were fitted.

        There is no τ where draws have none.
        """
        if not isinstance(self.sampler, Tempered):
            return {}
        found = {name: getattr(self.sampler, name) for name in ("temperature", "temperature_of_mean", "width")}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def stop(self) -> StoppingRule | None:
        """When `predict` makes no more draws for an input."""
        return self.approximation.stop if self.approximation else None

    @property
    def end_token_ids(self) -> list[int]:
        """Tokens that end an answer: the tokenizer's, in which training ends responses, and those of the base model."""
        of_base = option(self.model, {}, "eos_token_id")
        ids = {self.tokenizer.eos_token_id, *(of_base if isinstance(of_base, list) else [of_base])}
        return sorted(ids - {None})

    def records(self, source: Any, *, require_labels: bool = False) -> list[dict[str, Any]]:
        """What `bloblora.data.as_records` makes of a source; a text alone is one to classify, or to answer."""
        known = known_of(self.task, self.config.reading_options().columns())
        return as_records(source, known=known, require_labels=require_labels)

    def predict(
        self,
        records: Any,
        num_samples: int = 10,
        seed: int = 0,
        *,
        batch_size: int = 32,
        progress: bool = False,
    ) -> Prediction:
        """Predictions of records or texts, in their order, whatever label they have; see `bloblora.predict`.

        ``records`` are what `bloblora.data.as_records` takes: a list of texts or dicts, a table, a dataset.
        """
        options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
        return self.predict_encoded(self._examples(records), num_samples, seed, **options)

    def predict_encoded(self, examples: Any, num_samples: int = 10, seed: int = 0, **options: Any) -> Prediction:
        """The same of records as the task encodes them."""
        how: dict[str, Any] = {"task": self.task, "sampler": self.sampler, "stop": self.stop, "distance": self.distance}
        return predict(self.model, examples, num_samples, seed, **how, **options)

    def hidden_states(self, records: Any, *, batch_size: int = 32, progress: bool = False) -> Tensor:
        """The last hidden states of records under the mean weights, (n, d); see `prediction.hidden_states`."""
        options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
        return hidden_states(self.model, self._examples(records), task=self.task, sampler=self.sampler, **options)

    def generate(self, records: Any, num_samples: int = 10, seed: int = 0, **options: Any) -> Generation:
        """Answers to records or prompts, in their order, whatever response they have; see
        `bloblora.posterior_generate`.

        A prompt that leaves no room for ``max_new_tokens``, and with ``p_true`` for the question whether the answer is
        true, in what the model can read loses its beginning.

        Raises:
            RunError: ``max_new_tokens`` alone are more than that.
        """
        new, limit = options.get("max_new_tokens") or 0, self.tokenizer.model_max_length
        limit -= question_length(self.tokenizer) if options.get("p_true") else 0
        if new >= limit:
            raise RunError(f"max_new_tokens must be below {limit}, the tokens that the model reads, got {new}")
        task, longest = self.task, limit - new + 1  # of which the task leaves one for the answer
        if (task.max_length or limit) > longest:
            task = replace(task, max_length=longest)
        return self.generate_encoded(self._examples(records, task), num_samples, seed, **options)

    def generate_encoded(
        self, examples: list[dict[str, Any]], num_samples: int = 10, seed: int = 0, **options: Any
    ) -> Generation:
        """The same of records as the task encodes them; an answer ends in one of `end_token_ids`."""
        batch = self.task.collate(examples)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        given = {"tokenizer": self.tokenizer, "sampler": self.sampler, **options}
        if getattr(options.get("generation_config"), "eos_token_id", None) is None:
            given.setdefault("eos_token_id", self.end_token_ids or None)
        return posterior_generate(self.model, inputs, num_samples, seed, **given)

    def score(
        self, records: Any, num_samples: int = 10, seed: int = 0, *, batch_size: int = 16, progress: bool = False
    ) -> TokenScores:
        """What the weight samples say of the records' responses, token by token; see `bloblora.generation.score`.

        Raises:
            TaskError: a record has no response, or is over the task's ``max_length``.
        """
        examples = [*response_examples(self.task, self.records(records), self.tokenizer)]
        prompts, responses = ([example[name] for example in examples] for name in ("prompt", "response"))
        options: dict[str, Any] = {"sampler": self.sampler, "batch_size": batch_size, "progress": progress}
        return score(self.model, prompts, responses, num_samples, seed, **options)

    def describe_texts(
        self,
        records: Any,
        num_samples: int = 10,
        seed: int = 0,
        *,
        correctness: Correctness | None = None,
        decision: Decision | None = None,
        draws: bool = False,
        **options: Any,
    ) -> Iterator[dict[str, Any]]:
        """For each record the answer and its uncertainty, also of each token; and other answers that are asked for."""
        records = self.records(records)
        own = draws or needs_draws(correctness, decision)
        found = self.generate(records, num_samples, seed, draws=own, **options)
        answers: list[dict[str, Any]] = [{"answer": text} for text in found.texts]
        for name, texts in (("draws", found.draw_texts if draws else ()), ("sampled", found.sampled_texts)):
            answers = [{**one, name: others} for one, others in zip(answers, texts, strict=True)] if texts else answers
        yield from text_lines(records, answers, found, self.tokenizer, correctness, decision=decision)

    def describe_scores(
        self,
        records: Any,
        num_samples: int = 10,
        seed: int = 0,
        *,
        claims: str | None = None,
        correctness: Correctness | None = None,
        decision: Decision | None = None,
        **options: Any,
    ) -> Iterator[dict[str, Any]]:
        """For each record the scores of its response, of each token, and of its claims; see `runs.texts.text_lines`."""
        records = self.records(records)
        found = self.score(records, num_samples, seed, **options)
        responses = [{"response": record["response"]} if "response" in record else {} for record in records]
        yield from text_lines(records, responses, found, self.tokenizer, correctness, claims, decision)

    def _examples(self, records: Any, task: tasks.Task | None = None) -> list[dict[str, Any]]:
        return tasks.encode_all(
            task or self.task, [unanswered(record) for record in self.records(records)], self.tokenizer
        )


def load_run(
    directory: str | os.PathLike[str] | RunDescription,
    approximate: str | None = None,
    *,
    trust_remote_code: bool = False,
    dequantized: bool = False,
) -> Run:
    """Load a finished run, onto the GPU where there is one; under FSDP each process holds a part of it.

    Args:
        directory: its folder, or its place on the hub: ``hub:user/name`` or ``hub:user/name@revision``; or what
            `open_run` read of it.
        approximate: how its predictions save forwards, at some loss; see `PredictionOptions`.
        trust_remote_code: run the Python code that the base model comes with, where it needs some; no run can ask for
            it.
        dequantized: with ordinary linear layers in the place of a base model's quantized ones, of the same weights.

    Raises:
        RunError: the folder isn't one, its training isn't finished, or its method can't be approximated so.
        AdapterFileError: the adapter's files are damaged.
        ModelError: the base model can't be loaded.
    """
    description = open_run(directory)
    config, method, task = description.config, description.method, description.task
    approximation = None if approximate is None else Approximation.parse(approximate)
    if approximation:
        approximation.check(method, task)
    if split := sharded():
        check_sharded(method, approximate)
    description.check_base()
    base = base_model(config, task, trust_remote_code)
    if dequantized:
        dequantize(base)
    models.check_fingerprint(config.model, description.base)  # the hub may have had a newer one
    if torch.accelerator.is_available() and not split and not getattr(base, "is_quantized", False):
        base.to(processes().device)
    model, sampler = method.load(base, description.folder)
    if split:
        model = shard(model)
    if approximation:
        sampler = approximation.apply(sampler)
    return Run(
        model,
        models.load_tokenizer(config.model, trust_remote_code=trust_remote_code),
        task,
        sampler,
        config,
        method,
        description.training,
        description.adapter_sha256,
        approximation,
        open_distance(description),
    )


def base_model(config: RunConfig, task: tasks.Task, trust_remote_code: bool) -> Any:
    """The pretrained model, with a head where the task needs one."""
    options: dict[str, Any] = {**head_of(task), "dtype": config.dtype, "quantize": config.quantize}
    options |= {"device": processes().device, "trust_remote_code": trust_remote_code}
    model = models.load_model(config.model, **options)
    if task.head is not None:
        model.config.problem_type = task.likelihood.problem_type  # by which `bayesianize` knows labels from numbers
    return model
