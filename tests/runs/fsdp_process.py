"""What `test_fsdp.py` has done by two processes that accelerate starts with examples/accelerate/fsdp.yaml.

Run as a module it does all of it: ``python -m tests.runs.fsdp_process FOLDER``; ``<folder>/<rank>.pt`` is what each
process ended with.
"""

import gc
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from bloblora import find_posterior, predict, runs
from bloblora.adapter import save
from bloblora.adapter.sharding import whole
from bloblora.cli import main
from bloblora.prediction import WeightDraws
from bloblora.runs.processes import processes
from bloblora.tasks import Classification
from bloblora.training import DivergedError, PosteriorHistograms

from ..training.conftest import TASK, classifier, examples, logs, make_trainer, trainable
from ..training.scenarios import LOGGED, noisy, resumed
from .launched import BATCH, Quiet, settings

TRAININGS = [
    ("paper_flow", "normal"),
    ("joint", "normal"),
    ("joint", "normal", "auto"),
    ("paper", "normal"),
    ("paper_flow", "learned_normal"),
    ("paper_flow", "student_t"),
    ("joint", "normal", 0.2, "frozen"),
    ("paper_flow", "normal", 0.2, "frozen"),
]
SAVED = "saved"


def quiet(folder, style, prior, prior_std=0.2, frozen=None, *, batch):
    """Without noise, plain SGD: the weights after two passes over 24 examples, the logs, and what draws predict.

    ``frozen`` are M of the first layer and Ω of the second.
    """
    prior_mean = "zero" if prior_std == 0.2 else "start"
    model = classifier(init_std=0.25, prior=prior, prior_std=prior_std, prior_mean=prior_mean)
    posterior = find_posterior(model)
    still = [t for n, t in posterior.named_means().items() if "layers.0" in n]
    still += [t for n, t in posterior.named_std_parameters().items() if "layers.1" in n]
    for tensor in still if frozen else ():
        tensor.requires_grad_(False)
    trainer = make_trainer(
        folder, model, 24, per_device_train_batch_size=batch, max_steps=6, optim="sgd", learning_rate=0.05,
        optimizer_style=style, std_learning_rate=0.02,
    )  # fmt: skip
    with trainer.posterior.mean():
        trainer.train()
    trainer.save_model(str(folder / SAVED))
    return {
        "weights": all_of(trainable(model)),
        "frozen": [whole(p.detach()) for side in trainer.posterior.parameters() for p in side if not p.requires_grad],
        "logs": {key: logs(trainer, key) for key in LOGGED},
        "log_probs": {n: predict(model, examples(8), n, 3, task=TASK, sampler=WeightDraws(trainer.posterior)).log_probs
                      for n in (0, 5)},
    }  # fmt: skip


def all_of(weights):
    return {name: whole(weight) for name, weight in weights.items()}


@dataclass(frozen=True, kw_only=True)
class NotFinite(Classification):
    """Logits that aren't finite, in one of the processes."""

    def logits(self, model, batch):
        return super().logits(model, batch) * (torch.nan if torch.distributed.get_rank() else 1)


def errors(folder):
    """What each process says where the loss of one isn't finite, and when an adapter is saved by itself."""
    trainer = make_trainer(folder, classifier())
    trainer.task = NotFinite(labels=TASK.labels, pad_token_id=0)
    with pytest.raises(DivergedError) as diverged:
        trainer.train()
    with pytest.raises(ValueError, match="FSDP") as saved:
        save(trainer.model, folder)
    trainer = make_trainer(folder, classifier(), callbacks=[PosteriorHistograms(folder)])
    with pytest.raises(ValueError, match="FSDP") as watched:
        trainer.train()
    return [str(error.value) for error in (diverged, saved, watched)]


class Stop(TrainerCallback):
    """An error after the fifth step, of which the third is saved."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 5:
            raise KeyboardInterrupt


def settings_of(folder: Path, output: str):
    """As `settings`, of a run's configuration."""
    config = dict(data=f"{folder}/texts.jsonl", model=f"{folder}/base", output=f"{folder}/{output}")
    config |= dict(head="trained")  # which FSDP has by default, and one process hasn't
    return config | dict(steps=6, batch_size=BATCH // processes().num_processes, r=2, learning_rate=0.01)


def run(folder: Path, output: str, *callbacks):
    """A run as `bloblora train` makes it."""
    config = runs.RunConfig.of(**settings_of(folder, output), save_steps=3)
    return runs.train(config, progress=False, callbacks=callbacks)


def validated(folder: Path, output: str):
    """A run that validation stops: its best checkpoint, τ and T."""
    config = settings_of(folder, output) | dict(validation=f"{folder}/validation.jsonl", eval_steps=2)
    config["temperature_scaling"] = True
    return runs.train(runs.RunConfig.of(**config), progress=False, callbacks=[Quiet()])


def parts(model):
    """Entries that this process holds, and all."""
    held = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [sum(p.numel() for p in side) for side in (held, model.parameters())]


def predict_of(folder: Path):
    """The command, but for its output."""
    return ["predict", f"{folder}/whole", "--input", f"{folder}/texts.jsonl", "--samples", "5", "--output"]


def everything(folder: Path):
    results = {which: quiet(folder / "-".join(map(str, which)), *which, batch=4) for which in TRAININGS}
    found = noisy(folder / "noisy", "paper_flow", "random")
    results["noisy"] = {"weights": all_of(found["weights"]), "seen": found["seen"]}
    for kind in ("SHARDED_STATE_DICT", os.environ["FSDP_STATE_DICT_TYPE"]):  # the file's is the last
        os.environ["FSDP_STATE_DICT_TYPE"] = kind
        results[kind] = {name: all_of(weights) for name, weights in resumed(folder / kind, "random").items()}
    results["errors"] = errors(folder / "errors")
    run(folder, "quiet-two", Quiet())
    validated(folder, "validated-two")
    try:
        run(folder, "stopped", Stop())
    except KeyboardInterrupt:
        results["resumed_from"] = run(folder, "stopped").training["resumed_from"]
    data = ("--data", f"{folder}/texts.jsonl", "--model", f"{folder}/base")
    main(["train", *data, "--output", f"{folder}/whole", *settings()])
    results["parts"] = parts(runs.load_run(folder / "whole").model)
    main([*predict_of(folder), f"{folder}/answers.jsonl"])
    torch.save(results, folder / f"{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # as in tests/conftest.py
    # accelerate offers FSDP on GPUs only, so what it would choose by them is chosen here; all else is its own.
    torch.distributed.init_process_group("gloo")
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    everything(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
