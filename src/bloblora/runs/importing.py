"""Adapters of the published BLoB code, https://github.com/Wang-ML-Lab/bayesian-peft, as runs.

PEFT saves that code's ``lora_A_rho`` (r, n) of each layer beside A and B. σ is ρ², or log(1 + exp ρ) where its option
``bayes_eps`` was negative, which the file doesn't say: ρ then starts below 0. Its model is wrapped twice, and so names
begin with PEFT's prefix twice.
"""

import os
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import set_peft_model_state_dict
from torch import Tensor

from .. import models, tasks
from ..adapter import find_posterior
from ..adapter.storage import MEAN_CONFIG, MEAN_FILE
from ..data import IN_MEMORY
from ..files import check_finite_tensors, read_json, read_tensors
from ..messages import quoted
from ..methods.method import posterior_draws
from .automatic import with_dtype
from .config import RunConfig, RunError
from .folder import alone, check_writable, described
from .run import Run, base_model, load_run
from .train import fresh_lora, save_run

_PREFIX, _RHO = "base_model.model.", ".lora_A_rho"
_LORA = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "fan_in_fan_out"),
    *("rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "layers_pattern"),
)


def import_adapter(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    model: str | None = None,
    task: str = "choice_letter",
    max_length: int | None = 300,
    prior_std: float = 0.2,
    std_parameterization: str | None = None,
    trust_remote_code: bool = False,
) -> Run:
    """Make a run of an adapter that the published BLoB code saved.

    Args:
        directory: the folder that it saved the adapter to.
        output: folder of the run, new.
        model: base model, as for `RunConfig`; default the one that the adapter names.
        task: how questions become logits, without a head; that code's is ``choice_letter``.
        max_length: most tokens of a question; 300 in that code.
        prior_std: σp, its ``bayes_beta``.
        std_parameterization: ``square`` for σ = ρ², ``softplus`` for a negative ``bayes_eps``; default by ρ's sign.
        trust_remote_code: run the Python code that the base model comes with, where it needs some.

    Returns:
        The run, loaded from its folder.

    Raises:
        RunError: the folder has no such adapter, or one with an option of LoRA that a run doesn't have, such as
            ``use_dora``; it doesn't fit the base model; or an option is out of its range.
    """
    folder, output = Path(directory), Path(output)
    with alone(output):  # the lock that a kill left beside a whole run goes
        if (output / "run.json").exists():
            raise RunError(f"{output}: is a run already; choose another output")
    check_writable(output / "run.json")
    content = read_json(folder / MEAN_CONFIG, RunError)
    stock, rho = _split(folder / MEAN_FILE)
    if content.get("task_type") != "CAUSAL_LM":
        raise RunError(
            f"{folder / MEAN_CONFIG}: task_type is {content.get('task_type')!r}; only adapters of language models, "
            "'CAUSAL_LM', can be imported: of others that code saves no classification head"
        )
    _check_options(content, folder / MEAN_CONFIG)
    if (model := model or content.get("base_model_name_or_path")) is None:
        raise RunError(f"{folder / MEAN_CONFIG}: it names no base model; give one")
    middle = torch.cat([tensor.flatten() for tensor in rho.values()]).float().median()
    given = RunConfig.of(
        preset="paper",
        data=IN_MEMORY,
        output=str(output),
        model=model,
        validation=0,
        prior_std=prior_std,
        std_parameterization=std_parameterization or ("square" if middle > 0 else "softplus"),
        task={"name": task, "max_length": max_length},
        lora={name: content[name] for name in _LORA if content.get(name) not in (None, {})},
    )
    config = with_dtype(given)
    with alone(output):
        tokenizer = models.load_tokenizer(config.model, trust_remote_code=trust_remote_code)
        built = tasks.build_task(task, [], tokenizer, max_length=max_length)
        if built.head is not None:
            raise RunError(f"task {task!r} has a classification head, which that code doesn't save")
        base = base_model(config, built, trust_remote_code)
        method = config.build_method()
        peft_model: Any = method.prepare(base, fresh_lora(config, built, base))
        _copy(peft_model, stock, rho, folder / MEAN_FILE)
        sampler, training = posterior_draws(peft_model), {"imported": str(folder)}
        run = Run(peft_model, tokenizer, built, sampler, config, method, training)
        save_run(run, method, output, replace(described(config), base=models.fingerprint(config.model)))
    return load_run(output, trust_remote_code=trust_remote_code)


def _check_options(content: dict[str, Any], file: Path) -> None:
    """Raise a RunError for options of LoRA without which the answers would be others, such as ``use_dora``."""
    known, defaults = {*_LORA, *(option.name for option in fields(PeftConfig))}, LoraConfig().to_dict()
    if content.get("init_lora_weights") == "gaussian":  # where the training started
        known.add("init_lora_weights")
    others = {name: value for name, value in content.items() if name not in known and value}
    if wrong := [f"{name} is {quoted(value)}" for name, value in others.items() if value != defaults.get(name)]:
        raise RunError(
            f"{file}: {', '.join(wrong)}; an adapter with that can't be imported: of LoRA's options a run takes over "
            f"{', '.join(_LORA)}"
        )


def _split(file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The stock LoRA as PEFT names it, and ρ by `Posterior.named_std_parameters`' names."""
    saved = {re.sub(rf"^({re.escape(_PREFIX)})+", _PREFIX, n): t for n, t in read_tensors(file, RunError).items()}
    check_finite_tensors(saved, str(file))
    rho = {name.removesuffix("_rho"): tensor for name, tensor in saved.items() if name.endswith(_RHO)}
    if not rho:
        raise RunError(
            f"{file}: no lora_A_rho in it, so it isn't an adapter of the published BLoB code; a plain LoRA is what "
            "`bloblora train --start-from` takes"
        )
    # PEFT also saves the weight of a head that has a LoRA; it is the base model's.
    return {name: tensor for name, tensor in saved.items() if re.search(r"\.lora_[AB]\.weight$", name)}, rho


@torch.no_grad()
def _copy(model: Any, stock: dict[str, Tensor], rho: dict[str, Tensor], file: Path) -> None:
    """Copy the file's A, B and ρ into a fresh model; a RunError where they aren't those of its layers."""
    posterior = find_posterior(model)
    assert posterior is not None
    wanted = posterior.named_std_parameters()
    expected = {f"{name.removesuffix('A')}{factor}.weight" for name in wanted for factor in "AB"}
    if rho.keys() != wanted.keys() or stock.keys() != expected:
        differing = sorted((rho.keys() ^ wanted.keys()) | (stock.keys() ^ expected))
        raise RunError(
            f"{file}: its layers aren't the base model's: they differ in {', '.join(differing[:3])}; give the model "
            "that it was trained on"
        )
    try:
        set_peft_model_state_dict(model, stock)
        for name, parameter in wanted.items():
            parameter.copy_(rho[name])
    except RuntimeError as error:
        raise RunError(f"{file}: it doesn't fit the base model: {error}") from error
