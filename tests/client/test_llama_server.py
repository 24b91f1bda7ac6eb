"""llama.cpp's own server, a process a draw, on the draws as GGUF.

BLOBLORA_LLAMA_SERVER=llama.cpp/build/bin/llama-server pytest tests/client/test_llama_server.py
"""

import os
import shlex
import subprocess
from contextlib import ExitStack

import pytest

from bloblora.export import export
from tests.client.checks import check_choices
from tests.client.conftest import SAMPLES, SEED, free_port, serving
from tests.export.tiny_gguf import write_base

SERVER = os.environ.get("BLOBLORA_LLAMA_SERVER")
# float32 keys and values, as transformers has them, and not the half precision that is the default
OPTIONS = shlex.split("--ctx-size 256 --threads 1 --flash-attn off --cache-type-k f32 --cache-type-v f32")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not SERVER, reason="BLOBLORA_LLAMA_SERVER isn't set"),
]


def test_letters_of_a_server_a_draw(exported, tmp_path):
    case = exported("choice_letter")
    case.folder = tmp_path / "gguf"
    manifest = export(case.run.config.output, case.folder, "gguf", num_samples=SAMPLES, seed=SEED)
    write_base(tmp_path / "base.gguf", case.base)
    urls = {}
    with ExitStack() as stack, (tmp_path / "log").open("w") as log:
        for name in manifest.draws:
            port = free_port()
            command = [SERVER, "--model", str(tmp_path / "base.gguf"), "--lora", str(case.folder / f"{name}.gguf")]
            server = serving([*command, "--port", str(port), *OPTIONS], port, 60, stdout=log, stderr=subprocess.STDOUT)
            urls[name] = stack.enter_context(server)
        check_choices(case, urls, top_logprobs=400)
