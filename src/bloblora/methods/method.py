"""What every method is: four functions, in this order: prepare, fit, save and load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, EvalPrediction, PreTrainedModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .. import adapter
from ..adapter import AdapterFileError, Posterior, check_folder, find_posterior
from ..adapter.bayesianize import Weights
from ..adapter.storage import BLOB_CONFIG
from ..files import check_finite_tensors, file_sha256, read_hashed_json, read_tensors, write_hashed_json, write_tensors
from ..prediction import Point, Prediction, Sampler, WeightDraws, fit_temperature, tempered_nll
from ..prediction.prediction import check_finite
from ..tasks import Task
from ..tasks.likelihood import Categorical, Likelihood, likelihood_of
from ..tasks.task import Example
from ..training import BlobTrainingArguments, last_checkpoint
from ..training.arguments import TRAINED
from ..training.checkpoints import remove_torn

if TYPE_CHECKING:
    from ..training import BlobTrainer
    from ..training.class_means import ClassMeans

MEAN = "mean"
TEMPERED_NLL = "tempered_nll"
"""Of an evaluation: the NLL under the temperature that makes it lowest, nats an example."""
PRIOR_IN_LOSS: Mapping[str, Any] = {"max_grad_norm": 0.0}
"""`Method.training_defaults` where the loss has a prior's part: clipping would move the point where both balance."""


@dataclass(frozen=True)
class Draw:
    """One weight sample as an ordinary LoRA.

    Attributes:
        name: ``mean``, or ``draw_00`` and so on.
        adapter_name: the adapter of the model that it changes.
        weights: A (r, n) or B (m, r), by layer and letter, that differ from that adapter's own.
    """

    name: str
    adapter_name: str
    weights: Weights = field(default_factory=dict)


@dataclass(kw_only=True)
class Method:
    """One way to get a distribution over fine-tuned models; its fields are the options that it takes.

    A field needs a type and a default, and ``metadata={"help": …}`` says in a sentence what it does; ``"search": (low,
    high)`` is where `bloblora tune` looks for it. The command line, configuration files and the reference are derived
    from the fields. What differs from the defaults below is declared as a class attribute.

    Fitting ends in a `Sampler`, and prediction, metrics and reports see nothing else of a method.

    Raises:
        ValueError: an option is out of its range; the message names it, its value and what would be right.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    searched: ClassVar[Mapping[str, tuple[float, float]]] = {}
    """Where `bloblora tune` looks for options whose fields don't say it."""
    training_defaults: ClassVar[Mapping[str, Any]] = {}
    """Of `TrainingArguments`, where this method needs others than a LoRA does."""
    lora_defaults: ClassVar[Mapping[str, Any]] = {}
    """Of ``peft.LoraConfig``, likewise."""
    holdout: ClassVar[float] = 0.0
    """Share of the training records that is kept from training; methods that need it make it an option."""
    starts_from_lora: ClassVar[bool] = True
    """Whether a trained LoRA can take the place of the fresh one that `prepare` makes."""
    post_hoc: ClassVar[bool] = False
    """Whether the LoRA is trained as a plain one, and `fit` adds a distribution around it."""
    whole_model: ClassVar[bool] = False
    """Whether the base model's own weights are trained, so that there is no adapter."""
    deterministic: ClassVar[bool] = False
    """Whether there is one function, on which all draws agree."""
    gaussian: ClassVar[bool] = False
    """Whether draws come from a `bloblora.adapter.Posterior`, so that they can be mirrored or linearized."""
    takes_prior: ClassVar[bool] = False
    """Whether another run's posterior can be its prior: it has the options of `bloblora.adapter.BlobConfig`."""
    sharded: ClassVar[bool] = False
    """Whether it trains and predicts where FSDP splits the model: nothing looks at a part of a weight."""
    writes_text: ClassVar[bool] = True
    """Whether a draw is a model, which can write and score text; logits that are changed afterwards can't."""
    likelihoods: ClassVar[tuple[str, ...]] = ("categorical", "bradley_terry", "bernoulli", "tags", "gaussian")
    """Names of the likelihoods that it trains and predicts with (`bloblora.tasks.Likelihood`)."""
    class_means: ClassVar[bool] = True
    """Whether a head of class means (``head`` of `BlobTrainingArguments`) belongs to the weights that it ends with."""
    weighs_classes: ClassVar[bool] = True
    """Whether its loss is the task's likelihood, in which classes may have weights, and no other one."""
    files: ClassVar[tuple[str, ...]] = ("adapter_config.json", "blob_config.json", "*.safetensors")
    """Patterns of the files that `save` writes, which `bloblora push` uploads."""

    def check_run(self, lora: Mapping[str, Any], training: Mapping[str, Any]) -> None:
        """Raise a ValueError where options of LoRA or of the Trainer don't fit this method."""

    def prepare(self, base: PreTrainedModel, lora: LoraConfig) -> nn.Module:
        """The model to train: by default the base with a fresh LoRA."""
        return get_peft_model(base, lora)

    def fit(self, model: nn.Module, training: Training) -> Sampler:
        """Train what `prepare` returned, or go on where a stopped training was."""
        training.run(model)
        return Point()

    def save(self, model: nn.Module, sampler: Sampler, folder: Path) -> None:
        """Write what `load` needs; other files of the folder stay."""
        adapter.save(model, folder)  # type: ignore[arg-type]

    def load(self, base: PreTrainedModel, folder: Path) -> tuple[nn.Module, Sampler]:
        """The model in eval mode, and its sampler; `weights_file` has checked the folder before.

        Raises:
            AdapterFileError: a file is missing or damaged, or doesn't fit the base model.
        """
        return adapter.load(base, folder, checked=True), Point()

    def weights_file(self, folder: Path) -> Path:
        """The file with the trained weights, after all has been checked that can be without a model.

        Raises:
            AdapterFileError: a file is missing or damaged.
        """
        return check_folder(folder) / SAFETENSORS_WEIGHTS_NAME

    def draws(self, model: PeftModel, sampler: Sampler, num_samples: int, seed: int) -> list[Draw]:
        """The mean and the draws of `bloblora.predict` for this N and seed as ordinary LoRAs, in order.

        The model is a plain LoRA from then on. A method with fewer functions than N gives those that it has.

        Raises:
            ValueError: by `check_draws`, which needs no model: a function of this method is no LoRA.
        """
        active, generator = model.active_adapter, torch.Generator().manual_seed(seed)
        if self.deterministic:
            drawn: list[Weights] = [{}] * min(num_samples, 1)
        else:
            drawn = [self.draw_weights(model, sampler, generator) for _ in range(num_samples)]
        adapter.debayesianize(model)
        return [Draw(MEAN, active), *(Draw(f"draw_{i:02d}", active, weights) for i, weights in enumerate(drawn))]

    def check_draws(self, num_samples: int) -> None:
        """Raise a ValueError where N functions of this method aren't LoRAs; N = 0 asks for the mean alone."""

    def draw_weights(self, model: PeftModel, sampler: Sampler, generator: torch.Generator) -> Weights:
        """A and B of the next draw, by layer and letter."""
        raise NotImplementedError(f"method {self.name!r} doesn't say how it draws weights")

    def idle(self, labels: bool) -> set[str]:
        """Options that `bloblora tune` may search, without a part where a head gives one label each or does not."""
        return set()

    def described(self) -> dict[str, Any]:
        """The options and their values, as JSON takes them."""
        return {name: getattr(self, name) for name in self.options()}

    @classmethod
    def options(cls) -> dict[str, Field[Any]]:
        """The options by name, as dataclass fields: default, and ``metadata`` with ``help`` and ``search``."""
        return {option.name: option for option in fields(cls)}


class GaussianMethod(Method):
    """A method whose model has a `bloblora.adapter.Posterior` after `fit`."""

    gaussian = True

    def draw_weights(self, model: PeftModel, sampler: Sampler, generator: torch.Generator) -> Weights:
        """Of the posterior, without a head."""
        posterior = Posterior(model, model.active_adapter)
        return posterior.without_head(posterior.sample(generator))

    def load(self, base: PreTrainedModel, folder: Path) -> tuple[nn.Module, Sampler]:
        """The adapter with its posterior."""
        model, _ = super().load(base, folder)
        return model, posterior_draws(model)

    def weights_file(self, folder: Path) -> Path:
        """The mean's file."""
        file = super().weights_file(folder)
        if not (file.parent / BLOB_CONFIG).is_file():
            raise AdapterFileError(f"{folder}: the posterior's files are missing; without them this is a plain LoRA")
        return file


def posterior_draws(model: nn.Module) -> WeightDraws:
    """Draws from the posterior of a model that has one."""
    posterior = find_posterior(model)
    assert posterior is not None
    return WeightDraws(posterior)


def load_added(model: nn.Module, file: Path) -> nn.Module:
    """Set what a method added to a LoRA after `Method.load`, and PEFT saved with it; the model, in eval mode.

    Raises:
        AdapterFileError: the file is damaged, or lacks weights, or has them of another shape.
    """
    saved = read_tensors(file, AdapterFileError)
    if missing := sorted(get_peft_model_state_dict(model, save_embedding_layers=False).keys() - saved.keys()):
        raise AdapterFileError(f"{file}: {len(missing)} weights of the method are missing, the first {missing[0]}")
    try:
        set_peft_model_state_dict(model, saved)
    except RuntimeError as error:
        raise AdapterFileError(f"{file}: its weights aren't those of this run's options: {error}") from error
    return model.eval()


@dataclass
class Training:
    """What a method trains with: a task, encoded examples of it, and options and callbacks of the Trainer.

    Attributes:
        arguments: of `BlobTrainingArguments`; ``output_dir`` is where checkpoints go, and ``head`` is ``trained`` if
            it isn't given.
        holdout: examples that are kept from training (`Method.holdout`).
        validation: examples on which a training is evaluated as ``arguments`` say; its best checkpoint is kept.
        patience: evaluations without improvement after which a training stops; None: it runs to its end.
        validated: what each training with ``validation`` found, see `Validated`.
        logs: those of the last training that hold its losses.
        problems: what is wrong with a posterior that was trained, a sentence each.
        found: what a method says in ``run.json`` of what it chose, by name.
        predicted: what it has predicted of ``validation`` in the end, by N, where it has.
        trained: the model comes trained; `train_lora` leaves it as it is.
        class_means: of each training, None where its head was trained.
    """

    task: Task
    examples: Sequence[Example]
    arguments: dict[str, Any]
    holdout: Sequence[Example] = ()
    validation: Sequence[Example] = ()
    patience: int | None = None
    validated: list[Validated] = field(default_factory=list)
    callbacks: Sequence[TrainerCallback] = ()
    logs: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)
    predicted: Mapping[int, Prediction] = field(default_factory=dict)
    trained: bool = False
    class_means: list[ClassMeans | None] = field(default_factory=list)

    @property
    def own_task(self) -> Task:
        """The task itself, also where the examples are those of a cached trunk."""
        return getattr(self.task, "task", self.task)

    def join_held_out(self) -> dict[str, float]:
        """Let the validation records join the head's class means, where there was one training; see `ClassMeans.join`.

        Nothing may be measured on them afterwards.
        """
        means = self.class_means[0] if len(self.class_means) == 1 else None
        return {} if means is None else means.join()

    def train_lora(self, model: nn.Module) -> None:
        """Train a plain LoRA, for post-hoc methods; of one that comes trained only its NLL is looked at."""
        if not self.trained:
            self.run(model)
            return
        nll = self._loop(model, None, self.arguments).evaluate(self.examples)["eval_loss"]
        check_finite(torch.tensor(nll), model)
        self.logs = [{"step": 0, "nll": nll}]

    def run(
        self, model: nn.Module, *, part: str = "", trainer: type[BlobTrainer] | None = None, **changes: Any
    ) -> BlobTrainer:
        """Train what requires gradients of a model on the examples, from its last checkpoint if there is one.

        A method that trains several times names each ``part``, which then has its own checkpoints; ``changes`` are of
        the arguments.
        """
        arguments = self.arguments | changes
        arguments["output_dir"] = str(Path(arguments["output_dir"], part))
        loop = self._loop(model, trainer, arguments)
        for callback in (*self.callbacks, _LogLosses()):
            loop.add_callback(callback)
        if self.validation and self.own_task.head is None:
            loop.add_callback(_EvaluateBefore(loop))
        if self.validation and self.patience is not None:
            loop.add_callback(EarlyStoppingCallback(self.patience))
        checkpoint = last_checkpoint(arguments["output_dir"])
        if checkpoint is None and loop.args.should_save and loop.args.save_total_limit is not None:
            remove_torn(arguments["output_dir"], None)
        loop.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self.logs = [log for log in loop.state.log_history if "nll" in log]
        self.problems += loop.problems
        if loop.posterior is not None:
            self.found["automatic"] = loop.automatic()
        self.class_means.append(loop.class_means)
        if loop.class_means is not None:
            self.found["class_means"] = loop.class_means_found
        if self.validation:
            self.validated.append(Validated.of(part, loop))
        return loop

    def _loop(self, model: nn.Module, trainer: type[BlobTrainer] | None, arguments: dict[str, Any]) -> BlobTrainer:
        # Here, because what predicts needs no Trainer, which takes a second to import.
        from ..training import BlobTrainer

        task: Any = self.task
        if not self.validation:
            arguments = arguments | {"eval_strategy": "no", "load_best_model_at_end": False}
        measured = self.validation and self.own_task.kind != "generation"
        loop = (trainer or BlobTrainer)(
            model,
            BlobTrainingArguments(**{"head": TRAINED, **arguments}, temperature_scaling=False),
            task=task,
            train_dataset=self.examples,
            eval_dataset=self.validation or None,
            data_collator=task.collate,
            compute_metrics=partial(_measured, likelihood_of(task)) if measured else None,
        )
        # The Trainer's own print each log on standard output, which belongs to results.
        loop.remove_callback(PrinterCallback)
        loop.remove_callback(ProgressCallback)
        return loop


@dataclass(frozen=True)
class Validated:
    """What the evaluations of one training found.

    Attributes:
        part: of the method's trainings, "" where there is one.
        best_step: of the checkpoint that was kept.
        nll: its NLL, nats an example.
        accuracy: its accuracy; None where answers aren't classes.
        stopped_early: whether patience ended the training.
        seconds: of all evaluations.
        curve: ``step``, ``nll``, ``accuracy`` and ``tempered_nll`` of each evaluation.
        before: the same before the first step, of a model that can answer then; None under a fresh head.
    """

    part: str
    best_step: int
    nll: float
    accuracy: float | None
    stopped_early: bool
    seconds: float
    curve: list[dict[str, Any]]
    before: dict[str, Any] | None = None

    @classmethod
    def of(cls, part: str, loop: BlobTrainer) -> Validated:
        """Of a training that is done."""
        logs = [log for log in loop.state.log_history if "eval_loss" in log]
        names = {"step": "step", "nll": "eval_loss", "accuracy": "eval_accuracy", TEMPERED_NLL: f"eval_{TEMPERED_NLL}"}
        curve: list[dict[str, Any]] = [{n: log[key] for n, key in names.items() if key in log} for log in logs]
        before = curve.pop(0) if curve[0]["step"] == 0 else None
        best = next(row for row in curve if row["step"] == loop.state.best_global_step)
        stopped_early = loop.state.global_step < loop.state.max_steps
        seconds = sum(log["eval_runtime"] for log in logs)
        return cls(part, best["step"], best["nll"], best.get("accuracy"), stopped_early, seconds, curve, before)


class _LogLosses(TrainerCallback):
    """Logs the training's losses also at its end, and at each evaluation, which may turn out to be the end."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_log |= control.should_evaluate or control.should_training_stop

    on_epoch_end = on_step_end


class _EvaluateBefore(TrainerCallback):
    """Evaluates a model before its first step, and leaves the generators of the training as they were."""

    def __init__(self, loop: BlobTrainer) -> None:
        self._loop = loop

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            with torch.random.fork_rng():
                self._loop.evaluate()


def _measured(likelihood: Likelihood, prediction: EvalPrediction) -> dict[str, float]:
    """NLL under the best temperature, and of classes the share of the examples whose most probable one is right."""
    logits, labels = (torch.as_tensor(values) for values in (prediction.predictions, prediction.label_ids))
    temperature = fit_temperature([logits[None]], [labels], likelihood)
    found = {TEMPERED_NLL: tempered_nll([logits[None]], [labels], temperature, likelihood).mean().item()}
    if isinstance(likelihood, Categorical):
        found["accuracy"] = (logits.argmax(-1) == labels).double().mean().item()
    return found


@dataclass(frozen=True)
class State:
    """What a method or a run keeps in ``NAME.json``; its tensors are in ``NAME.safetensors``.

    Attributes:
        values: what there is besides tensors.
        tensors_sha256: of the file of tensors, where there is one.
    """

    values: dict[str, Any]
    tensors_sha256: str | None = None


def write_state(folder: Path, name: str, values: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
    """Write what a method keeps beside the adapter: values in ``name.json``, tensors in ``name.safetensors``.

    Raises:
        FloatingPointError: a number is NaN or infinite.
    """
    content: dict[str, Any] = {"values": values}
    if tensors is not None:
        check_finite_tensors(tensors, name)
        file = folder / f"{name}.safetensors"
        write_tensors(file, tensors)
        content["tensors_sha256"] = file_sha256(file)
    write_hashed_json(folder / f"{name}.json", content)


def read_state(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_state` wrote.

    Raises:
        AdapterFileError: a file is missing, truncated or altered.
    """
    state = State(**read_hashed_json(folder / f"{name}.json", AdapterFileError, State))
    if state.tensors_sha256 is None:
        return state.values, {}
    file = folder / f"{name}.safetensors"
    if file.is_file() and file_sha256(file) != state.tensors_sha256:
        raise AdapterFileError(f"{file}: its SHA-256 isn't the one in {name}.json: it was altered or cut")
    return state.values, read_tensors(file, AdapterFileError)
