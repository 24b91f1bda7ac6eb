"""A model folder's Python code: not run, not asked for, and never by what a run says."""

import ast
import io
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from transformers import CodeGenConfig, dynamic_module_utils
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import bloblora
from bloblora import models, runs
from bloblora.adapter import AdapterFileError, check_folder
from bloblora.client import DrawClient
from bloblora.export import export, read_manifest
from bloblora.generation import find_agree
from bloblora.models import ModelError
from tests.tiny_base import give_base, write_signed

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({marker!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
CLASSES = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
REFUSED = "Python code of its own, which isn't run"


@pytest.fixture
def own(files, tmp_path, monkeypatch):
    """A base model with code of its own, and the file that the code makes."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))  # yes to whatever is asked
    folder, marker = tmp_path / f"own_{tmp_path.name}", tmp_path / "was_run"
    shutil.copytree(files.base, folder)
    change(folder / "config.json", model_type="own", auto_map=CLASSES)
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    return folder, marker


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def stranger(own, choice_run, tmp_path):
    """A run of such a model, which also says that its code is to be trusted."""
    folder = tmp_path / "stranger"
    shutil.copytree(choice_run, folder)
    give_base(folder, own[0])
    return folder


def test_every_call_says_whether_code_is_trusted():
    """transformers asks on standard output where it isn't said; torch's pickles are read without code alone."""
    found = []
    for file in Path(bloblora.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name, given = ast.unparse(node.func), {keyword.arg for keyword in node.keywords}
                if re.fullmatch(r"(Auto\w+|kind)\.from_(pretrained|config)", name):
                    found.append(name)
                    assert given & {"trust_remote_code", None}, (file, node.lineno)
                assert name != "torch.load" or "weights_only" in given, (file, node.lineno)
    assert len(found) > 8


def test_commands_refuse_it(call, files, stranger, own, tmp_path):
    folder, marker = own
    commands = (
        ("train", "--model", folder, "--data", files.questions, "--output", tmp_path / "new", "--steps", "1"),
        ("predict", stranger, "--input", files.questions),
        ("evaluate", stranger, "--data", files.questions),
        ("export", stranger, "--output", tmp_path / "export"),
        ("info", stranger),
        ("serve", stranger, "--port", "0"),
    )
    for command in commands:
        status, out, err = call(*command)
        assert (status, out) == (2, ""), command
        assert REFUSED in err
        assert "--trust-remote-code" in err
    assert not marker.exists()
    assert not (tmp_path / "new").exists()


def test_python_refuses_it_and_runs_it_where_that_is_meant(own, stranger, tmp_path):
    folder, marker = own
    for refused in (
        lambda: models.load_tokenizer(str(folder)),
        lambda: models.load_model(str(folder)),
        lambda: models.layer_names(str(folder)),
        lambda: models.model_type(str(folder)),
        lambda: runs.load_run(stranger),
        lambda: bloblora.pipeline(stranger),
        lambda: export(stranger, tmp_path / "out"),
    ):
        with pytest.raises(ModelError, match=REFUSED):
            refused()
    assert not marker.exists()
    meant = runs.load_run(stranger, trust_remote_code=True)
    assert marker.exists()
    assert type(meant.model.get_base_model()).__name__ == "OwnModel"


def test_the_flag_is_for_one_command_and_stored_nowhere(call, files, own, tmp_path):
    folder, marker = own
    output = tmp_path / "new"
    training = (
        "train",
        "--model",
        folder,
        "--data",
        files.questions,
        "--output",
        output,
        "--steps",
        "1",
        "--targets",
        "q_proj",
    )
    status, _, err = call(*training, "--trust-remote-code")
    assert status == 0, err
    assert marker.exists()
    texts = [file.read_text() for file in output.iterdir() if file.suffix in (".json", ".yaml")]
    assert not any("trust_remote_code" in text for text in texts)
    marker.unlink()
    assert call("predict", output, "--input", files.questions)[0] == 2
    status, out, _ = call("predict", output, "--input", files.questions, "--trust-remote-code")
    assert status == 0
    assert len(out.splitlines()) == 2


def test_no_file_can_give_it(call, files, stranger, own, tmp_path):
    """Neither run.json, whose unknown options are refused, nor a file of options, which may be a stranger's."""
    for place in ("config", "options"):
        stored = json.loads((stranger / "run.json").read_text())
        stored[place]["trust_remote_code"] = True
        (tmp_path / "run.json").write_text((stranger / "run.json").read_text())
        write_signed(stranger / "run.json", stored)
        assert call("predict", stranger, "--input", files.questions)[0] == 2
        shutil.move(tmp_path / "run.json", stranger / "run.json")
    options = tmp_path / "options.yaml"
    options.write_text(yaml.safe_dump({"trust_remote_code": True, "model": str(own[0]), "data": files.questions}))
    assert REFUSED in call("predict", stranger, "--input", files.questions)[2]
    write_signed(stranger / "run.json", json.loads((stranger / "run.json").read_text()) | {"trust_remote_code": True})
    assert "unknown field 'trust_remote_code'" in call("predict", stranger, "--input", files.questions)[2]
    status, _, err = call("train", "--config", options, "--output", tmp_path / "new")
    assert status == 2
    assert "trust_remote_code isn't taken from a file; give it on the command line" in err
    assert not own[1].exists()


def test_a_tokenizer_of_an_export(choice_run, own, tmp_path):
    out = tmp_path / "export"
    export(choice_run, out, num_samples=0)
    shutil.copy(own[0] / "own.py", out / "tokenizer")
    change(out / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]})
    change(out / "tokenizer" / "tokenizer_config.json", tokenizer_class="OwnTokenizer")
    replace(read_manifest(out), files={}).write(out)  # as if it had been exported so
    with pytest.raises(ModelError, match=REFUSED):
        DrawClient(out, "http://localhost:1/v1")
    assert not own[1].exists()
    client = DrawClient(out, "http://localhost:1/v1", trust_remote_code=True)
    assert type(client._tokenizer).__name__ == "OwnTokenizer"


def test_code_for_generation_is_not_run(files, own, tmp_path):
    """transformers also looks for a function of the folder that writes text."""
    folder = tmp_path / "writes"
    shutil.copytree(files.base, folder)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"open({str(own[1])!r}, 'w')\ndef generate(**_): ...")
    models.load_model(str(folder))
    assert not own[1].exists()


def test_an_adapter_that_names_a_module(run, tmp_path):
    """PEFT imports ``megatron_core`` of adapter_config.json."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    change(folder / "adapter_config.json", megatron_config={"a": 1}, megatron_core="antigravity")
    with pytest.raises(AdapterFileError, match="megatron_config isn't taken from a file"):
        check_folder(folder)


def test_code_of_a_model_of_entailment(own):
    """Of a kind that transformers knows, but not as a classifier: only then it looks for code."""
    folder, marker = own
    CodeGenConfig(n_layer=1, n_head=2, n_embd=16, rotary_dim=4).save_pretrained(folder)
    change(folder / "config.json", auto_map={"AutoModelForSequenceClassification": "own.OwnModel"})
    models.load_tokenizer(str(folder))
    with pytest.raises(ModelError, match=REFUSED):
        find_agree(f"nli:{folder}")
    assert not marker.exists()


def test_code_of_this_test_can_be_run(own):
    """Otherwise nothing above would have shown that it isn't."""
    get_class_from_dynamic_module("own.OwnConfig", str(own[0]))
    assert own[1].exists()
