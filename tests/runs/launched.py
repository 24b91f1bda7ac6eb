"""What accelerate starts as two processes, and what `test_processes.py` has them and one process do.

Run as a module it does all of it: ``python -m tests.runs.launched FOLDER SUFFIX``.
"""

import gc
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from bloblora import runs
from bloblora.adapter import find_posterior
from bloblora.cli import main
from bloblora.runs.processes import processes

ROOT = Path(__file__).parents[2]
BATCH = 4  # examples a step, over all processes


def settings() -> list[str]:
    """The same steps, however many processes share them."""
    batch = str(BATCH // processes().num_processes)
    return ["--steps", "6", "--batch-size", batch, "--r", "2", "--learning-rate", "0.01", "--save-steps", "3"]


class Quiet(TrainerCallback):
    """Trains without noise, which differs from process to process; the KL stays."""

    def on_train_begin(self, args, state, control, model=None, **_):
        self.mean = find_posterior(model).mean()
        self.mean.__enter__()

    def on_train_end(self, *_, **__):
        self.mean.__exit__(None, None, None)


def launch(config: str, module: str, *arguments: str) -> None:
    """Run a module in the two processes of a shipped accelerate configuration."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "-m", module, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count("saved to") == 1  # one of them prints


def everything(folder: Path, suffix: str) -> None:
    base, texts, long = (str(folder / name) for name in ("base", "texts.jsonl", "long.jsonl"))
    data = ["--data", texts, "--model", base, "--method", "lora"]
    main(["train", *data, "--output", f"{folder}/lora-{suffix}", *settings()])
    batch = BATCH // processes().num_processes
    config = dict(data=texts, model=base, steps=6, batch_size=batch, r=2, learning_rate=0.01)
    saved = dict(config, save_steps=3)
    adapter = dict(factors="A", head_prior_std="none", init_std=0.25)
    blob = runs.RunConfig.of(**saved, output=f"{folder}/blob-{suffix}", **adapter)
    runs.train(blob, progress=False, callbacks=[Quiet()])
    runs.train(runs.RunConfig.of(**saved, output=f"{folder}/head-{suffix}", factors="none"), progress=False)
    validated = dict(config, method="lora", validation=f"{folder}/validation.jsonl", eval_steps=2, patience=2)
    runs.train(runs.RunConfig.of(**validated, output=f"{folder}/validated-{suffix}"), progress=False)
    # everybody of the same run, of which one process has made several chunks
    main(["predict", f"{folder}/trained", "--input", long, "--samples", "2", "--output", f"{folder}/{suffix}.jsonl"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # as in tests/conftest.py
    everything(Path(sys.argv[1]), sys.argv[2])
    processes().destroy_process_group()
