"""Trainings that `test_two_processes.py` runs in one process, and by torchrun in two.

Run as a module it does all of them and writes what each process ended with: ``<folder>/<rank>.pt``.
"""

import gc
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from .conftest import classifier, examples, logs, make_trainer, trainable

STYLES, SAMPLING = ("joint", "paper"), ("sequential", "random", "group_by_length")
QUIET = [(style, sampling) for style in STYLES for sampling in SAMPLING]
LOGGED = ("loss", "nll", "kl", "kl_weight", "elbo")


def quiet(folder, style, sampling, batch, **options):
    """Without noise, plain SGD: the weights after two passes over 24 examples, and the logs."""
    model = classifier(init_std=0.25)
    trainer = make_trainer(
        folder, model, 24, per_device_train_batch_size=batch, max_steps=6, optim="sgd", learning_rate=0.05,
        optimizer_style=style, train_sampling_strategy=sampling, kl_weighting="reweighted", **options,
    )  # fmt: skip
    with trainer.posterior.mean():
        trainer.train()
    return {"weights": trainable(model), "logs": {key: logs(trainer, key) for key in LOGGED}}


def by_class_means(folder, batch, **options):
    """A plain LoRA below a head that isn't trained, by SGD: the weights after two passes over 24 examples."""
    model = classifier(bayesian=False)
    options = dict(max_steps=6, optim="sgd", learning_rate=0.05, head="class_means", **options)
    trainer = make_trainer(folder, model, 24, per_device_train_batch_size=batch, **options)
    trainer.train()
    return {"weights": trainable(model), "nll": logs(trainer, "nll")}


class Noise(TrainerCallback):
    """Collects what the first layer's B is given: with one same example everywhere, A x of this process's A."""

    def __init__(self, model):
        self.seen = []
        layer = next(module for name, module in model.named_modules() if name.endswith("q_proj.lora_B.default"))
        layer.register_forward_pre_hook(lambda module, args: self.seen.append(args[0].detach().clone()))


def noisy(folder, style, sampling, prior="normal", **options):
    """Everybody has the same example, and each process its own noise."""
    data = examples(1) * 24
    options = dict(
        per_device_train_batch_size=4, max_steps=5, save_strategy="steps", save_steps=1, num_weight_draws=2,
        optimizer_style=style, train_sampling_strategy=sampling, **options,
    )  # fmt: skip
    model = classifier(init_std=0.25, prior=prior)
    noise = Noise(model)
    make_trainer(folder, model, data, **options).train()
    return {"weights": trainable(model), "seen": noise.seen}


def resumed(folder, sampling):
    """Uninterrupted, and once more from the middle of the second pass."""
    options = dict(max_steps=5, save_strategy="steps", save_steps=1, train_sampling_strategy=sampling)
    model, again = classifier(init_std=0.25), classifier(init_std=0.25, seed=8)
    make_trainer(folder, model, 24, **options).train()
    torch.manual_seed(123)
    make_trainer(folder, again, 24, **options).train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    return {"weights": trainable(model), "resumed": trainable(again)}


def main(folder: Path) -> None:
    options = dict(ddp_backend="gloo")
    results = {("quiet", *which): quiet(folder / "quiet", *which, batch=4, **options) for which in QUIET}
    results["class means"] = by_class_means(folder / "class_means", batch=4, **options)
    for style in STYLES:
        results["noisy", style] = noisy(folder / style, style, "random", **options)
    for style in ("joint", "paper_flow"):
        results["estimated KL", style] = noisy(folder / f"estimated-{style}", style, "random", "student_t", **options)
    for sampling in ("random", "group_by_length"):
        results["resumed", sampling] = resumed(folder / sampling, sampling)
    torch.save(results, folder / f"{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # as in tests/conftest.py
    main(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
