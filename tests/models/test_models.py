"""Names to models: folders, GGUF files, hub ids, and clear errors for what can't be had."""

import json
import pwd

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, RobertaConfig

from bloblora.models import ModelError, fingerprint, load_model, load_tokenizer, resolve
from tests.tasks.conftest import train_tokenizer
from tests.tiny_base import save_base

WIDTH, LAYERS, HEADS, VOCAB = 32, 2, 4, 400


def write_gguf(file):
    """A random two-layer Llama with a byte-level BPE tokenizer, as llama.cpp has one."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    bpe = json.loads(train_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    tokens += [f"<unused{i}>" for i in range(VOCAB - len(tokens))]
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 3 else 1 for i in range(VOCAB)])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (VOCAB, WIDTH), "output": (VOCAB, WIDTH), "output_norm": (WIDTH,)}
    for i in range(LAYERS):
        names = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (WIDTH, WIDTH))
        names |= {"ffn_gate": (64, WIDTH), "ffn_up": (64, WIDTH), "ffn_down": (WIDTH, 64)}
        names |= {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in names.items()}
    for name, shape in shapes.items():
        scale = 0.1 if "norm" in name else 0.3
        weight = (scale * rng.standard_normal(shape) + ("norm" in name)).astype(np.float32)
        writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOBLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_gguf_file_gives_what_transformers_reads_from_it(gguf_file, cache):
    tokens = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    reference = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    model = load_model(str(gguf_file))
    assert model.dtype == torch.float32
    with torch.no_grad():
        expected = reference.eval()(tokens).logits
        torch.testing.assert_close(model.eval()(tokens).logits, expected, rtol=0, atol=1e-6)
    assert expected.std() > 0.1
    own = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    text = "Where is my card? Charged twice."
    assert load_tokenizer(str(gguf_file))(text)["input_ids"] == own(text)["input_ids"]


def test_others_can_read_a_conversion_where_the_umask_allows_it(gguf_file, cache):
    folder = cache / resolve(str(gguf_file)).rpartition("/")[2]
    own = (folder / "config.json").stat().st_mode
    assert own & 0o004
    assert {file.stat().st_mode for file in folder.iterdir()} == {own}


def test_a_folder_needs_no_home(base, monkeypatch):
    """A user without an entry in the system's list, as in containers."""
    monkeypatch.delenv("BLOBLORA_CACHE", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    monkeypatch.setattr("bloblora.files._REMEMBERED", 0)  # a small model for a large one, whose hash is kept
    assert load_model(str(base)).config.vocab_size == VOCAB
    assert len(fingerprint(str(base))["model.safetensors"]) == 64
    with pytest.raises(ModelError, match="this user has no home folder for the cache; set HOME, or BLOBLORA_CACHE"):
        load_model("smollm2-135m")


def test_a_conversion_is_made_once_and_torn_ones_are_made_again(gguf_file, cache):
    folder = cache / resolve(str(gguf_file)).rpartition("/")[2]
    weights = folder / "model.safetensors"
    content, written = weights.read_bytes(), weights.stat().st_mtime_ns
    assert resolve(str(gguf_file)) == str(folder)
    assert weights.stat().st_mtime_ns == written
    for tear in (
        lambda: weights.write_bytes(content[:100]),
        lambda: (folder / "config.json").unlink(),
        lambda: (folder / "bloblora.json").write_text("{"),
        lambda: (folder / "bloblora.json").write_text("[]"),
        lambda: folder.rename(folder.with_name(f".{folder.name}.converting")),  # as a kill leaves it
    ):
        tear()
        assert resolve(str(gguf_file)) == str(folder)
        assert weights.read_bytes() == content
        assert (folder / "config.json").is_file()
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_progress_of_a_conversion_is_on_standard_error(gguf_file, cache, capsys):
    resolve(str(gguf_file))
    captured = capsys.readouterr()
    assert "converting tiny.gguf to safetensors" in captured.err
    assert captured.out == ""
    resolve(str(gguf_file))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("size", [3, 20, 2000, 60_000])
def test_a_damaged_gguf_file(gguf_file, cache, tmp_path, size):
    file = tmp_path / "cut.gguf"
    file.write_bytes(gguf_file.read_bytes()[:size])
    with pytest.raises(ModelError, match=r"cut\.gguf: "):
        resolve(str(file))
    assert not cache.exists() or list(cache.iterdir()) == []


def test_what_is_no_gguf_file(cache, tmp_path):
    (tmp_path / "zip.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ModelError, match=r"zip\.gguf: not a GGUF file \(it doesn't start with 'GGUF'\)"):
        resolve(str(tmp_path / "zip.gguf"))
    assert not cache.exists()


def test_a_folder(base):
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(base).eval()(tokens).logits
        assert torch.equal(load_model(str(base)).eval()(tokens).logits, expected)
    assert load_model(str(base), dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_head_is_in_float32_above_a_trunk_that_is_not(base, dtype):
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
    model = get_peft_model(load_model(str(base), num_labels=3, dtype=dtype), lora)
    head = model.base_model.model.score.modules_to_save["default"]
    assert head.weight.dtype == torch.float32
    before = head.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    logits = model(torch.tensor([[5, 6, 7]])).logits
    assert logits.dtype == torch.float32
    logits[0, 1].backward()
    # smaller than what the trunk's type resolves around a weight of 0.02
    head.weight.grad.mul_(1e-7 / head.weight.grad.abs().max())
    optimizer.step()
    assert not torch.equal(head.weight, before)
    assert torch.equal(head.weight.to(getattr(torch, dtype)), before.to(getattr(torch, dtype)))


def test_a_classification_head_knows_the_padding(base):
    model = load_model(str(base), num_labels=3)
    assert model.score.out_features == 3
    assert model.config.pad_token_id == load_tokenizer(str(base)).pad_token_id == 0


def test_a_tokenizer_without_a_pad_token(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    assert load_tokenizer(str(tmp_path)).pad_token == "</s>"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/no-such-model", "model 'nobody/no-such-model' can't be loaded: .*give 'smollm2-135m', a hub id"),
        ("./nowhere", "model './nowhere': no such folder"),
        ("a/b/c", "model 'a/b/c': no such folder"),
        ("nowhere.gguf", r"model 'nowhere\.gguf': no such file"),
        ("not an id!", "model 'not an id!' can't be loaded"),
    ],
)
def test_models_that_cannot_be_had(name, message, cache):
    for load in (load_tokenizer, load_model):
        with pytest.raises(ModelError, match=message):
            load(name)


def test_files_and_folders_that_are_no_models(base, tmp_path):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ModelError, match=r"a file, but not a \.gguf one"):
        resolve(str(tmp_path / "weights.bin"))
    with pytest.raises(ModelError, match=r"the folder has no config\.json"):
        resolve(str(tmp_path))
    with pytest.raises(ModelError, match="dtype 'int3' is not one of float32, bfloat16, float16"):
        load_model(str(base), dtype="int3")


@pytest.mark.parametrize("damage", ["weights", "config", "type"])
def test_a_damaged_folder(base, tmp_path, damage):
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    name, content = {
        "weights": ("model.safetensors", (base / "model.safetensors").read_bytes()[:5000]),
        "config": ("config.json", b"{"),
        "type": ("config.json", b'{"model_type": "nosuch"}'),
    }[damage]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=f"model '{tmp_path}' can't be loaded: "):
        load_model(str(tmp_path))


def test_a_models_own_code_is_neither_run_nor_asked_for(base, tmp_path):
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
    with pytest.raises(ModelError, match=r"can't be loaded: .*trust_remote_code|can't be loaded: .*custom code"):
        load_model(str(tmp_path))
    assert not (tmp_path / "was_run").exists()


def test_a_tokenizer_knows_the_models_positions(tmp_path):
    folder = save_base(tmp_path / "base")
    assert load_tokenizer(str(folder)).model_max_length == 256
    RobertaConfig(max_position_embeddings=514, pad_token_id=1).save_pretrained(folder)
    assert load_tokenizer(str(folder)).model_max_length == 512
