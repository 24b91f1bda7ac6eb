"""What decides a run: nested, and made of classes that exist, so that each option stands in one of them."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_type_hints

import yaml
from peft import LoraConfig, PeftConfig

from .. import models, tasks
from ..adapter.bayesianize import check_exact_start, moves_base
from ..data import IN_MEMORY, Known, ReadingOptions, as_records
from ..files import is_finite
from ..messages import quoted
from ..methods import METHODS, TEMPERED_NLL, Method, Rescaled
from ..training import OBJECTIVE, BlobTrainingArguments
from ..training.arguments import CLASS_MEANS

SHORT = {
    "steps": "max_steps",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "targets": "target_modules",
}
"""Names that may be typed for those of `TrainingArguments` and `LoraConfig`."""

TRAINING: Mapping[str, Any] = {
    "max_steps": "auto",
    "learning_rate": "auto",
    "per_device_train_batch_size": 16,
    "max_grad_norm": 1.0,
    "warmup_steps": 0.06,
    "lr_scheduler_type": "linear",
    "train_sampling_strategy": "group_by_length",
    "save_steps": 100,
    "save_total_limit": 1,
    "logging_steps": 20,
    "head": "auto",
    "report_to": [],
}
"""Defaults of the Trainer's options in a run."""

LORA: Mapping[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": None}
"""Defaults of LoRA's options in a run: the BLoB paper's r and α; PEFT chooses the layers by the model's type."""

_VALIDATION = ("eval_strategy", "eval_steps", "eval_num_samples", "load_best_model_at_end", "metric_for_best_model")
SAVING = ("save_steps", "save_strategy", "load_best_model_at_end")  # which validation decides
UNFIT = ("eval_delay", "eval_on_start", "batch_eval_metrics", "metric_for_best_model", "greater_is_better")
_EVALUATIONS = 15
"""About how often a training is evaluated where nothing else is said."""

# The best learning rate of a LoRA falls with the width of the model: Schulman et al., "LoRA Without Regret" (2025), a
# fit to Llama models. Measured here at a width of 576 alone; below it is no guide.
_LEARNING_RATE, _WIDTH, _EXPONENT, _HIGHEST = 5e-4, 2000, 0.781, 2e-3

_LAYERS = r"(?!all-linear$)[\w.-]+(\s*,\s*[\w.-]+)*"  # names with commas; any other text is a pattern of PEFT's

_OWNED = {"output_dir", "seed", "use_cpu", "disable_tqdm", "dataset_size", "resume_from_checkpoint", *OBJECTIVE}
_OWNED |= {"temperature_scaling"}  # `Rescaled` fits it, with a width, of any method
_PEFT = {option.name for option in fields(PeftConfig)}  # what every kind of adapter has, set by PEFT or the run
_SOURCES = ("data", "validation")  # of records, which may also be in memory
_SECTIONS = ("reading", "task", "lora", "method", "training")
_PRESETS = Path(__file__).parent / "presets"


class RunError(ValueError):
    """A run's folder or configuration can't be used; the message says what would be right."""


class _Records(list[dict[str, Any]]):
    """What was made records of, whose fields are in no other columns any more."""


@dataclass(kw_only=True)
class RunConfig:
    """Everything that decides a run.

    `RunConfig.of` takes the options of all sections by their names alone. ``data`` and ``validation`` may also be what
    `bloblora.data.as_records` takes, such as a list of dicts or a table; the run's files then call them "in memory".

    Raises:
        RunError: an option is unknown or out of its range; the message lists all problems.
        DataError: records in memory can't be used.
    """

    data: str | list[dict[str, Any]] = field(
        metadata={
            "help": "Training records: a .jsonl, .json, .csv, .tsv, .xlsx, .parquet or Rasa .yml file, also with .gz, "
            "a `datasets` folder, or a name such as `support_desk` or `arc_easy`."
        }
    )
    output: str = field(
        metadata={"help": "Folder of the run; a run that was stopped continues from its last checkpoint."}
    )
    model: str = field(
        default=models.DEFAULT_MODEL,
        metadata={"help": "Base model: `smollm2-135m`, a hub id, a folder, or a .gguf file."},
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={
            "help": "Of the base model; the adapter and a head are float32. `auto` is `bfloat16` for models that come "
            "in half precision or as .gguf, where the training's device computes in it natively, and `float32` "
            "elsewhere; the run keeps it."
        },
    )
    quantize: Literal["none", "4bit", "8bit", "hqq", "torchao"] = field(
        default="none",
        metadata={
            "help": "How the base model's linear layers below the head are quantized when it is loaded, for less "
            "memory: `4bit` (bitsandbytes NF4) or `hqq`, 4 bits a weight, `8bit` (bitsandbytes LLM.int8()) or "
            "`torchao`, 8 bits. Needs `bloblora[quantized]`; `docs/quantized.md` compares them."
        },
    )
    seed: int = field(
        default=0, metadata={"help": "Of initialization, data order, noise, and which records are held out."}
    )
    limit: int | None = field(
        default=None,
        metadata={"help": "Use only this many training records, chosen by `limit_seed`; per label for classification."},
    )
    limit_seed: int = field(default=0, metadata={"help": "Which records `limit` takes."})
    start_from: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a LoRA to start from, a run's or one that PEFT saved, with the same base model, r and "
            "lora_alpha. Post-hoc methods (tfb, laplace-lora) leave it as it is; other methods train it further."
        },
    )
    prior_from: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a run whose posterior becomes this run's prior, mean and Ω of each entry, and its "
            "start, with the same base model, r, lora_alpha and factors: for new records, when those of that run are "
            "gone."
        },
    )
    top_blocks: int | None = field(
        default=None, metadata={"help": "Adapt layers in the last so many transformer blocks only; default: in all."}
    )
    trunk_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder that keeps the hidden states below the adapted blocks for the training examples, which are "
            "then computed once and not at every step. Needs `top_blocks`; several runs can share it."
        },
    )
    validation: float | str | list[dict[str, Any]] = field(
        default="auto",
        metadata={
            "help": "Records on which the training is evaluated every `eval_steps` (default: about 15 times) and whose "
            "NLL chooses the checkpoint that is kept: a file, a name such as `support_desk:validation`, a share such "
            "as 0.1 of the training records, which is held out, per label, by `seed`, or 0 for none. `auto` is a "
            "share of 0.2, at most 500 records, where that is at least 10."
        },
    )
    patience: int | None = field(
        default=None,
        metadata={
            "help": "Evaluations without a lower validation NLL after which the training stops; default: it runs to "
            "its end, and the best checkpoint is kept."
        },
    )
    temperature_scaling: bool | None = field(
        default=None,
        metadata={
            "help": "Fit a temperature (arXiv 1706.04599) on the validation records, and where draws have a width that "
            "can be scaled, a scale of it, on top of any method; the checkpoint is then the one whose NLL is lowest "
            "under a temperature of its own. Default: where there are at least 10 such records with labels or choices."
        },
    )
    temperature_folds: int | None = field(
        default=None,
        metadata={
            "help": "Fit them by cross-validation instead, where records are few: all records are trained on, and so "
            "many trainings more, each without one part of the records, predict that part. Costs K + 1 trainings."
        },
    )
    keep_checkpoints: bool = field(
        default=False, metadata={"help": "Keep the folder `checkpoints` when the training is done."}
    )
    reading: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Which columns of the data hold what; `docs/data.md` lists all forms of data."},
    )
    task: Mapping[str, Any] = field(
        default_factory=lambda: {"name": "auto"},
        metadata={"help": "How records become logits; `auto` chooses by the form of the data."},
    )
    lora: Mapping[str, Any] = field(default_factory=dict, metadata={"help": "Options of `peft.LoraConfig`."})
    method: Mapping[str, Any] = field(
        default_factory=lambda: {"name": "blob"}, metadata={"help": "`bloblora methods` lists them with their options."}
    )
    training: Mapping[str, Any] = field(
        default_factory=dict, metadata={"help": "Options of `transformers.TrainingArguments`."}
    )

    def __post_init__(self) -> None:
        if problems := [*self._wrong_names()]:
            raise RunError("\n".join(problems))
        for name in _SOURCES:
            if not isinstance(source := getattr(self, name), str | int | float | None):
                setattr(self, name, self._records(name, source))
        if isinstance(self.model, str):
            self.model = models.located(self.model)
        if isinstance(targets := self.lora.get("target_modules"), str) and re.fullmatch(_LAYERS, targets):
            self.lora = {**self.lora, "target_modules": re.split(r"\s*,\s*", targets)}
        if problems := [*self._wrong_values(), *self._wrong_combinations()]:
            raise RunError("\n".join(problems))

    def _records(self, name: str, source: Any) -> list[dict[str, Any]]:
        """Of what is in memory; validation records have the columns of the training records where these are there."""
        options, known = self.reading_options(), self.known()
        if name != "data" or isinstance(source, _Records):
            options, known = self.beside(options.columns())
        return _Records(as_records(source, options, known=known, require_labels=True))

    @classmethod
    def of(cls, **options: Any) -> RunConfig:
        """The configuration of options that may be given by their names alone, or in their sections.

        ``RunConfig.of(data="a.csv", output="runs/a", method="blob", prior_std=0.1, r=16, steps=200)``. ``preset`` names
        options that others then override; None is an option that isn't given.

        Raises:
            RunError: as for the class.
        """
        options = {name: value for name, value in options.items() if value is not None}
        nested: dict[str, Any] = {name: _section(name, options.pop(name, {})) for name in _SECTIONS}
        if preset := options.pop("preset", None):
            for place, values in read_preset(preset).items():
                if place == "run":
                    options = {**values, **options}
                elif nested[place].get("name", values.get("name")) == values.get("name"):  # else of another method
                    nested[place] = {**values, **nested[place]}
        nested["method"] = {"name": "blob", **nested["method"]}
        nested["task"] = {"name": "auto", **nested["task"]}
        problems = []
        places = _places(nested["method"]["name"], nested["task"]["name"])
        for name, value in options.items():
            name = SHORT.get(name, name)
            place = places.get(name, "")
            if not place:
                problems.append(unknown_option(name, {*places, *SHORT}, nested["method"]["name"]))
            elif place == "run":
                nested[name] = value
            else:
                nested[place][name] = value
        problems += [f"{name} is missing" for name in ("data", "output") if name not in nested]
        if problems:
            raise RunError("\n".join(problems))
        return cls(**nested)

    def given(self) -> dict[str, Any]:
        """What was given, nested, as JSON takes it: no option that has its default, and no records."""
        own = {
            option.name: IN_MEMORY if isinstance(value, list) else value
            for option in fields(self)
            if option.name not in _SECTIONS and (value := getattr(self, option.name)) != option.default
        }
        return {**own, **{name: dict(section) for name in _SECTIONS if (section := getattr(self, name))}}

    def source(self, name: Literal["data", "validation"]) -> Any:
        """One of both as files and messages have it: records in memory have no name."""
        return IN_MEMORY if isinstance(value := getattr(self, name), list) else value

    def with_options(self, **options: Any) -> RunConfig:
        """The same but for some options, given as for `of`."""
        given = self.given() | {name: value for name in _SOURCES if isinstance(value := getattr(self, name), list)}
        sections = {name: _section(name, options.pop(name, given.pop(name, {}))) for name in _SECTIONS}
        places = _places(sections["method"]["name"], sections["task"]["name"])
        flat = {SHORT.get(name, name): value for name, value in options.items()}
        for name in flat.keys() & places.keys():
            if (place := places[name]) != "run":
                sections[place][name] = flat.pop(name)
        return RunConfig.of(**{**given, **sections, **flat})

    @property
    def validation_data(self) -> str | list[dict[str, Any]] | None:
        """The validation records that aren't a share of the training records: a file, NAME:split, or in memory."""
        return self.validation if isinstance(self.validation, str | list) and self.validation != "auto" else None

    def value(self, name: str) -> Any:
        """An option of LoRA or the Trainer, given or by default."""
        return _effective(self.given(), name)

    def reading_options(self) -> ReadingOptions:
        """How the training data are read."""
        return ReadingOptions(**self.reading)

    def known(self) -> Known:
        """What a task that is given says of them; otherwise the records decide."""
        task = tasks.TASKS.get(self.task.get("name", "auto"))
        kind, answer = (task.kind, task.answer) if task else (None, None)
        return Known(kind=kind, labels=self.task.get("labels"), answer=answer)

    def beside(self, columns: Mapping[str, str]) -> tuple[ReadingOptions, Known]:
        """How records beside the training data, which have these columns, are read, and what is known of them."""
        return ReadingOptions(skip_invalid=self.reading_options().skip_invalid), replace(self.known(), columns=columns)

    def build_method(self) -> Method:
        """The method with its options, and on top of it a temperature where one is asked for.

        Raises:
            ValueError: an option is out of its range.
        """
        options = {name: value for name, value in self.method.items() if name != "name"}
        method = METHODS[self.method["name"]](**options)
        if not self.temperature_scaling and self.temperature_folds is None:
            return method
        return Rescaled(inner=method, folds=self.temperature_folds, seed=self.seed)

    def build_lora(self, **options: Any) -> LoraConfig:
        """LoRA's configuration: the method's defaults, what was given, and what the run adds."""
        return LoraConfig(**{**_lora_defaults(self.method["name"]), **self.lora, **options})

    def training_options(self) -> dict[str, Any]:
        """Options of `TrainingArguments`: the defaults of a run and of its method, and what was given."""
        return {**_training_defaults(self.method["name"], self.training), **self.training}

    def validation_options(self, num_steps: int) -> dict[str, Any]:
        """Of them those of a training of so many steps that is evaluated; none without ``validation``.

        A checkpoint is written at each evaluation, so that the best one can be kept.
        """
        if not self.validation:
            return {}
        tempered = {"metric_for_best_model": TEMPERED_NLL, "greater_is_better": False}
        strategy = self.training.get("eval_strategy", "steps")
        every = self.training.get("eval_steps", max(1, math.ceil(num_steps / _EVALUATIONS)))
        return {
            "eval_strategy": strategy,
            "save_strategy": strategy,
            "eval_steps": every,
            "save_steps": every,
            "load_best_model_at_end": True,
            "restore_callback_states_from_checkpoint": True,  # how long patience has lasted
            **(tempered if self.temperature_scaling or self.temperature_folds else {}),
        }

    def initial_learning_rate(self) -> float:
        """As given, or as the base model's width has it."""
        if (given := self.value("learning_rate")) != "auto":
            return given
        width = None
        with suppress(models.ModelError):  # who loads it says so
            width = models.hidden_size(self.model)
        return min(float(f"{_LEARNING_RATE * (_WIDTH / (width or _WIDTH)) ** _EXPONENT:.2g}"), _HIGHEST)

    def leaves_head_open(self) -> bool:
        """Whether a head may be one of class means: it isn't another run's, and the method's options don't say else."""
        gaussian = {name: self.method.get(name, "auto") for name in ("head_prior_std", "factors")}
        own = METHODS[self.method["name"]]
        return (
            "head_prior_std" in own.options()
            and own.class_means
            and gaussian["head_prior_std"] == "auto"
            and gaussian["factors"] != "none"
            and self.start_from is None
            and self.prior_from is None
            and not self.training.get("torch_compile")
        )

    def search_space(self, labels: bool) -> dict[str, tuple[float, float]]:
        """Where `bloblora tune` looks: as the method's options declare, and half a decade around its learning rate.

        Args:
            labels: whether a head gives one label each, by which some options have a part or none.
        """
        rate, method = self.initial_learning_rate(), self.build_method()
        searched = {name: o.metadata.get("search", method.searched.get(name)) for name, o in method.options().items()}
        head = self.value("head")
        trained = labels and head != CLASS_MEANS and not (head == "auto" and self.leaves_head_open())
        found = {name: ends for name, ends in searched.items() if ends and name not in method.idle(trained)}
        return {**found, "learning_rate": (rate / 10**0.5, rate * 10**0.5)}

    def _wrong_names(self) -> Iterator[str]:
        """Of methods, tasks, and options in sections."""
        for name, registry in (("method", METHODS), ("task", {"auto": None, **tasks.TASKS})):
            if (value := getattr(self, name).get("name")) not in registry:
                yield f"{name} {quoted(value)} is not one of {', '.join(registry)}"
                return
        places = _places(self.method["name"], self.task["name"])
        for place in _SECTIONS:
            for name in getattr(self, place):
                if name != "name" and places.get(name) != place:
                    known = {known for known, where in places.items() if where == place}
                    yield unknown_option(name, known, self.method["name"], f"{place}: ")

    def _wrong_values(self) -> Iterator[str]:
        given = {
            **{name: getattr(self, name) for name in _ranges() if hasattr(self, name)},
            **self.lora,
            **self.training,
        }
        for name, (right, range_) in _ranges().items():
            if (value := given.get(name)) not in (None, TRAINING.get(name)) and not right(value):
                yield f"{name} must be {range_}, got {quoted(value)}"
        for name in ("data", "output", "model"):
            value = getattr(self, name)
            if not (isinstance(value, str) and value) and not (name == "data" and isinstance(value, list)):
                yield f"{name} must be a name that isn't empty, got {quoted(value)}"
        if [] in (self.data, self.validation):
            yield "data and validation must have at least one record"
        if isinstance(share := self.validation, (int, float)) and (isinstance(share, bool) or not 0 <= share < 1):
            yield f"validation must be a file, NAME:split, or a share in [0, 1), got {quoted(share)}"
        if share == "":
            yield "validation must be a name that isn't empty, got ''"
        for name, value in self.reading.items():
            if name.endswith("_column") and (not isinstance(value, str) or not value):
                yield f"{name} must be the name of a column, got {quoted(value)}"
        if self.lora.get("target_modules") == []:
            yield "target_modules must name at least one layer, or be left out"
        for name in ("dtype", "quantize"):
            if (value := getattr(self, name)) not in (known := get_args(get_type_hints(RunConfig)[name])):
                yield f"{name} must be one of {', '.join(known)}, got {quoted(value)}"

    def _wrong_combinations(self) -> Iterator[str]:
        try:
            method = self.build_method()
            lora = self.build_lora()
            check_exact_start(lora.init_lora_weights)
            if lora.init_lora_weights == "eva":  # PEFT would take a random start
                yield (
                    "init_lora_weights is 'eva', which needs data: fit it by PEFT's initialize_lora_eva_weights, save "
                    "that adapter, and give its folder as start_from"
                )
            method.check_run(vars(lora), self.training_options())
        except (TypeError, ValueError) as error:
            yield str(error)
            return
        yield from self._wrong_folds(method)
        width = self.method.get("head_prior_std", "auto")
        if self.value("head") == CLASS_MEANS and width not in ("auto", "none"):
            yield f"head {CLASS_MEANS!r} and head_prior_std {quoted(width)} are two kinds of head; leave one out"
        if self.data == self.validation == "-":
            yield "data and validation '-': standard input is read once; give a file for one of them"
        if self.trunk_cache is not None and (self.top_blocks is None or (method.holdout and not self.validation)):
            yield "trunk_cache needs top_blocks, and a method that trains on all records"
        yield from self._wrong_validation(method)
        if self.quantize != "none" and method.whole_model:
            yield f"quantize {self.quantize!r}: method {method.name!r} trains the base model's own weights; use none"
        if self.quantize != "none" and moves_base(start := lora.init_lora_weights):
            yield (
                f"init_lora_weights {quoted(start)}: it moves a part of the base weights into the adapter, and "
                f"those of quantize {self.quantize!r} can't be moved; leave one of them out"
            )
        if self.quantize != "none" and self.trunk_cache is not None:
            yield f"quantize {self.quantize!r}: trunk_cache isn't offered with it; leave one of them out"
        if self.start_from is not None and not method.starts_from_lora:
            yield f"start_from isn't for method {method.name!r}"
        if self.prior_from is not None:
            yield from self._wrong_prior(method)
        if self.top_blocks is not None and "layers_to_transform" in self.lora:
            yield "top_blocks and layers_to_transform both say which blocks are adapted; leave one of them out"
        if self.top_blocks is not None and isinstance(targets := lora.target_modules, str) and targets != "all-linear":
            yield (
                f"target_modules {quoted(targets)}: an expression says itself which blocks are adapted; with "
                "top_blocks name layers, or give 'all-linear'"
            )

    def _wrong_prior(self, method: Method) -> Iterator[str]:
        if self.start_from is not None:
            yield "start_from and prior_from both say where the training starts; leave one of them out"
        if not method.takes_prior:
            known = ", ".join(name for name, kind in METHODS.items() if kind.takes_prior)
            yield f"prior_from isn't for method {method.name!r}; it is for {known}"
            return
        if (family := self.method.get("prior", "normal")) != "normal":
            yield f"prior must be 'normal' with prior_from, whose posterior is Gaussian, got {quoted(family)}"
        for name in ("prior_mean", "prior_std", "init_std"):
            default = METHODS[self.method["name"]].options()[name].default
            if self.method.get(name, default) != default:
                yield f"{name}: prior_from says the prior's mean and width, and where Ω starts; leave it out"

    def _wrong_folds(self, method: Method) -> Iterator[str]:
        if self.temperature_folds is None:
            if self.temperature_scaling and not self.validation:
                yield "temperature_scaling is for validation records, and there are none: give validation"
            return
        if self.temperature_scaling:
            yield "temperature_scaling and temperature_folds both fit a temperature; leave one of them out"
        if self.start_from is not None and method.post_hoc:
            yield (
                f"temperature_folds: nothing is trained with start_from and method {method.name!r}, so that no record "
                "is out of a fold; give temperature_scaling, with records that the LoRA hasn't seen"
            )

    def _wrong_validation(self, method: Method) -> Iterator[str]:
        if self.validation == "auto":
            return
        if not self.validation:
            given = [name for name in _VALIDATION if self.training.get(name, "no") not in ("no", False)]
            given += ["save_strategy"] if self.training.get("save_strategy") == "best" else []
            for name in [*(["patience"] if self.patience is not None else []), *given]:
                yield f"{name} is for validation records, and there are none: give validation, or leave it out"
            return
        if self.training.get("eval_strategy", "steps") == "no":
            yield "eval_strategy must be 'steps' or 'epoch' with validation, got 'no'"
        for name in SAVING:
            if name in self.training:
                yield f"{name}: with validation a checkpoint is written at each evaluation; give eval_steps instead"
        for name in UNFIT:
            if self.training.get(name):
                yield f"{name} isn't offered with validation, whose evaluations all count, by their NLL; leave it out"
        if not self.temperature_scaling and method.post_hoc and self.start_from is not None:
            yield f"validation: nothing is trained with start_from and method {method.name!r}; leave it out"


def options_of(method: str, task: str = "auto") -> dict[str, dict[str, Field[Any]]]:
    """The options that a run with this method has: by section, ``run`` for its own, then by name.

    They are dataclass fields: ``metadata["help"]`` says what each does, and `default_of` its default.
    """
    kinds = [tasks.TASKS[task]] if task in tasks.TASKS else [*tasks.TASKS.values()]
    task_options: dict[str, Field[Any]] = {}
    for option, name in ((option, kind.name) for kind in kinds for option in fields(kind)):
        known, text = task_options.setdefault(option.name, option), option.metadata.get("help", "")
        if text not in (before := known.metadata.get("help", "")):  # one name, and in each task another meaning
            task_options[option.name] = known = copy(known)
            known.default, known.metadata = None, MappingProxyType({"help": f"{before} In {name}: {text}"})
    del task_options["pad_token_id"]
    return {
        "run": {option.name: option for option in fields(RunConfig) if option.name not in _SECTIONS},
        "reading": {option.name: option for option in fields(ReadingOptions)},
        "task": task_options,
        "method": METHODS[method].options() if method in METHODS else {},
        "lora": {option.name: option for option in fields(LoraConfig) if option.name not in _PEFT},
        "training": {option.name: option for option in fields(BlobTrainingArguments) if option.name not in _OWNED},
    }


def default_of(option: Field[Any], method: str) -> Any:
    """The default of one of `options_of`, in a run with this method."""
    defaults = {**_lora_defaults(method), **_training_defaults(method)}
    if option.name in defaults and option.name not in METHODS[method].options():
        return defaults[option.name]
    if option.default is not MISSING:
        return option.default
    return None if option.default_factory is MISSING else option.default_factory()


def _lora_defaults(method: str) -> dict[str, Any]:
    return {**LORA, **METHODS[method].lora_defaults}


def _training_defaults(method: str, given: Collection[str] = ()) -> dict[str, Any]:
    """Where epochs are given, they say how long a run is."""
    epochs = {"max_steps": -1} if "num_train_epochs" in given else {}
    return {**TRAINING, **METHODS[method].training_defaults, **epochs}


def different(old: Mapping[str, Any], new: Mapping[str, Any], *, besides: tuple[str, ...] = ("output",)) -> list[str]:
    """Where two configurations differ, of what `RunConfig.given` gave; an option that one lacks has its default."""
    flat_old, flat_new = flat_options(old), flat_options(new)
    names = [name for name in {**flat_old, **flat_new} if name not in besides]
    pairs = {name: (_effective(old, name), _effective(new, name)) for name in names}
    return [f"{name}: {quoted(there)} there, {quoted(now)} now" for name, (there, now) in pairs.items() if there != now]


def read_preset(name: str) -> dict[str, Any]:
    """The options of a preset.

    Raises:
        RunError: there is no such preset.
    """
    if name not in presets():
        raise RunError(f"preset {quoted(name)} is not one of {', '.join(presets())}")
    return yaml.safe_load((_PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))


def presets() -> list[str]:
    """Names of the presets."""
    return sorted(file.stem for file in _PRESETS.glob("*.yaml"))


def _section(name: str, value: Any) -> dict[str, Any]:
    """A section as a mapping; a method or a task may be its name alone."""
    if isinstance(value, str) and name in ("method", "task"):
        return {"name": value}
    if not isinstance(value, Mapping):
        raise RunError(f"{name}: {quoted(value)}; it must be a mapping of names to values")
    return {key: item for key, item in value.items() if item is not None}


@cache
def _places(method: str, task: str) -> dict[str, str]:
    """The section of each option by its name."""
    places: dict[str, str] = {}
    for place, options in options_of(method, task).items():
        for name in options:
            if (other := places.setdefault(name, place)) != place:
                raise RunError(f"{quoted(method)}: option {quoted(name)} is of both {other} and {place}; rename one")
    return places


def unknown_option(name: str, known: Collection[str], method: str, where: str = "") -> str:
    """What to say of an option that a run with this method doesn't have: which one is meant, or whose it is."""
    close = difflib.get_close_matches(name, known, 1)
    if owners := [other for other, kind in METHODS.items() if name in kind.options()]:
        return f"{where}method {quoted(method)} has no option {quoted(name)}; it is of {', '.join(owners)}"
    if owners := tasks.tasks_with(name):
        return f"{where}the run's task has no option {quoted(name)}; it is of {', '.join(owners)}"
    if close:
        return f"{where}unknown option {quoted(name)}; did you mean {close[0]!r}?"
    return f"{where}unknown option {quoted(name)}"


def flat_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of all sections by their names; ``method`` and ``task`` are names too."""
    sections = {place: value if place in _SECTIONS else {"name": value} for place, value in given.items()}
    return {place if name == "name" else name: v for place, section in sections.items() for name, v in section.items()}


def _effective(given: Mapping[str, Any], name: str) -> Any:
    """An option's value: what was given, or its default."""
    flat = flat_options(given)
    if name in flat:
        return list(value) if isinstance(value := flat[name], tuple) else value
    method = flat.get("method", "blob")
    if name in (defaults := _training_defaults(method, flat)):
        return defaults[name]
    for options in options_of(method, flat.get("task", "auto")).values():
        if name in options:
            return default_of(options[name], method)
    return {"method": "blob", "task": "auto"}.get(name)


@cache
def _ranges() -> dict[str, tuple[Callable[[Any], bool], str]]:
    """What is right for a number, and how to say it; for what LoRA and the Trainer take without a word, too."""

    def number(right: Callable[[float], bool], kinds: Any = (int, float)) -> Callable[[Any], bool]:
        return lambda v: isinstance(v, kinds) and not isinstance(v, bool) and is_finite(v) and right(v)

    count = number(lambda v: v >= 1, int), "at least 1"
    folds = number(lambda v: v >= 2, int), "at least 2"
    share = number(lambda v: 0 <= v < 1), "in [0, 1)"
    positive = number(lambda v: v > 0), "a finite number above 0"
    not_negative = number(lambda v: v >= 0), "a finite number of at least 0"
    seed = number(lambda v: 0 <= v < 2**32, int), "in 0..2^32 - 1"
    return {
        **dict.fromkeys(("max_steps", "per_device_train_batch_size", "r", "limit", "top_blocks", "patience"), count),
        **dict.fromkeys(("lora_alpha", "learning_rate", "num_train_epochs", "save_steps", "eval_steps"), positive),
        **dict.fromkeys(("max_grad_norm", "warmup_steps", "weight_decay"), not_negative),
        **dict.fromkeys(("lora_dropout",), share),
        **dict.fromkeys(("seed", "limit_seed"), seed),
        "temperature_folds": folds,
    }
