"""Exports of tiny runs, and real servers of them in processes of their own."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from bloblora import runs
from bloblora.export import export
from tests.tasks.conftest import tiny_causal, train_tokenizer
from tests.tiny_base import QUESTIONS, write_jsonl

SAMPLES, SEED = 3, 4
BLANKS = [
    {"question": "The trophy does not fit because the _ is too large.", "choices": ["trophy", "case"], "answer": 0},
    {"question": "My _ was charged twice.", "choices": ["card", "second payment"], "answer": 0},
]
PROMPTS = [
    {"prompt": "Question: Which gas?", "response": "carbon dioxide"},
    {"prompt": "What is it?", "response": "iron"},
]
RECORDS = {"choice_text": QUESTIONS, "choice_letter": QUESTIONS, "blank": BLANKS, "generation": PROMPTS}


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A run of a task, its records and its export; the base has heads wide enough for vLLM's attention on a CPU."""
    folder = tmp_path_factory.mktemp("client")
    tiny_causal(hidden_size=128).save_pretrained(folder / "base")
    train_tokenizer().save_pretrained(folder / "base")

    def exported(task, **changes):
        name = "-".join([task, *changes])
        run, out = folder / name, folder / f"{name}-export"
        if not out.is_dir():
            data = str(write_jsonl(folder / f"{task}.jsonl", RECORDS[task] * 2))
            options = {"steps": 10, "batch_size": 2, "r": 8, "learning_rate": 0.02, "init_std": 0.2, "kl_scale": 1.0}
            options |= {"data": data, "output": str(run), "model": str(folder / "base"), "task": task} | changes
            config = runs.RunConfig.of(**options)
            runs.train(config, progress=False)
            export(run, out, num_samples=SAMPLES, seed=SEED)
        return SimpleNamespace(run=runs.load_run(run), records=RECORDS[task], folder=out, base=folder / "base")

    return exported


@contextmanager
def serving(command, port, seconds, **options):
    """A server as a process, from when it answers; yields its URL."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    with subprocess.Popen(command, env=environment, start_new_session=True, **options) as process:
        try:
            deadline = time.monotonic() + seconds
            while True:
                assert process.poll() is None, "the server has ended"
                assert time.monotonic() < deadline, "the server doesn't answer"
                try:
                    httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=1)
                    break
                except httpx.HTTPError:
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            os.killpg(process.pid, signal.SIGTERM)


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="session")
def peft_url(exported):
    """Where a task's export is served, by stock PEFT; one process has all of them."""
    with ExitStack() as stack:
        urls = []

        def peft_url(task, **changes):
            folder = exported(task, **changes).folder
            if not urls:
                program, port = Path(__file__).with_name("peft_server.py"), free_port()
                command = [sys.executable, str(program), str(folder.parent), str(port)]
                urls.append(stack.enter_context(serving(command, port, 120)).removesuffix("/v1"))
            return f"{urls[0]}/{folder.name}/v1"

        yield peft_url
