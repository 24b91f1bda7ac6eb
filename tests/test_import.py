"""What an import loads, in a process of its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bloblora


@pytest.mark.parametrize("package", ["bloblora", "bloblora.client", "bloblora.data"])
def test_no_heavy_library(package):
    program = f"import {package}, sys; print(sorted({{'torch', 'transformers', 'peft'}} & {{*sys.modules}}))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"


ALONE = """
import sys

class Missing:
    def find_spec(self, name, *_):
        frame = sys._getframe(1)
        while "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        if frame.f_globals["__name__"].startswith("bloblora") and name.split(".")[0] in MISSING:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification
from bloblora import BlobTrainer, BlobTrainingArguments, bayesianize, load, predict, save

sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
base = lambda: LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=3, pad_token_id=0))
model = get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
bayesianize(model)
data = [{"input_ids": [3, 4, 5], "labels": i % 3} for i in range(4)]
arguments = BlobTrainingArguments(FOLDER, max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
BlobTrainer(model, arguments, train_dataset=data).train()
save(model, FOLDER)
print(predict(load(base(), FOLDER), {"input_ids": torch.tensor([[3, 4, 5]])}, 2).probabilities.shape)
"""


def test_what_training_needs(tmp_path):
    """On a machine with torch, transformers, peft, accelerate and safetensors: these bring the other imports."""
    missing = {
        "datasets",
        "gguf",
        "jsonargparse",
        "matplotlib",
        "scipy",
        "sklearn",
        "fastapi",
        "httpx",
        "ivon",
        "optuna",
    }
    program = f"MISSING = {missing}\nFOLDER = {str(tmp_path)!r}\n{ALONE}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("torch.Size([1, 3])\n"), done.stderr[-2000:]


def test_every_public_name_is_there():
    assert {*bloblora.__all__} <= {*dir(bloblora)}
    for name in bloblora.__all__:
        assert getattr(bloblora, name).__module__.startswith("bloblora."), name
    with pytest.raises(AttributeError, match="module 'bloblora' has no attribute 'nothing'"):
        bloblora.nothing  # noqa: B018


def test_type_checkers_see_the_same_names():
    block = next(node for node in ast.parse(Path(bloblora.__file__).read_text()).body if isinstance(node, ast.If))
    assert sorted(alias.name for line in block.body for alias in line.names) == bloblora.__all__
