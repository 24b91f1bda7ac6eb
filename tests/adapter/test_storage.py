"""A Bayesian adapter on disk: what comes back, what plain PEFT reads, and what damage is noticed."""

import hashlib
import json
import multiprocessing
import re
import shutil
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

from bloblora import BlobConfig, bayesianize, find_posterior, load, save
from bloblora.adapter import AdapterFileError, debayesianize, load_posterior
from tests.conftest import OVER_A, tiny_llama, with_lora

CONFIG = BlobConfig(prior_std=0.3, init_std=0.25, **OVER_A)
FILES = ("adapter_config.json", "adapter_model.safetensors", "blob_config.json", "posterior.safetensors")


def bayesian(config: BlobConfig = CONFIG, seed: int = 0, **overrides) -> PeftModel:
    """A tiny Llama whose every adapter weight is random."""
    model = with_lora(tiny_llama(**overrides))
    bayesianize(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def drawn(model, tokens, seed=5):
    with torch.no_grad(), find_posterior(model).draw(seed):
        return model(tokens).logits


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save(bayesian(), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of a saved adapter, to damage."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def edit(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def flip(file: Path) -> None:
    """Change one value of a safetensors file, whose layout stays valid."""
    tensors = load_file(file)
    tensors[sorted(tensors)[0]].view(-1)[3] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("damaged", ["lora_A", "lora_B", "blob_std_parameter_A"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_never_written(saved, folder, damaged, value):
    model = bayesian(seed=1)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if damaged in name).view(-1)[3] = value
    for write in (save, lambda model, folder: model.save_pretrained(folder)):
        with pytest.raises(FloatingPointError, match=f"adapter 'default': .*{damaged}.* has 1 of 128 entries that are"):
            write(model, folder)
    if "lora" in damaged:
        debayesianize(model)
        with pytest.raises(FloatingPointError, match="so nothing was written"):
            save(model, folder)
    assert contents(folder) == contents(saved)


@pytest.mark.parametrize("parameterization", ["square", "softplus", "log"])
def test_round_trip(parameterization, tokens, tmp_path):
    options = dict(std_parameterization=parameterization, estimator="flipout", **OVER_A)
    config = BlobConfig(prior_std=0.3, init_std=0.25, **options)
    model = bayesian(config)
    save(model, tmp_path)
    loaded = load(tiny_llama(), tmp_path)
    posterior = find_posterior(loaded)
    assert posterior.config == config
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert torch.equal(drawn(loaded, tokens), drawn(model, tokens))
    assert torch.equal(posterior.kl(), find_posterior(model).kl())


def test_training_goes_on_with_a_loaded_adapter(folder):
    loaded = load(tiny_llama(), folder, is_trainable=True)
    trainable = [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * 2 * 3  # layers, targets, and A, B, Ω
    assert all("lora_" in name or "blob_std_parameter" in name for name in trainable)


def test_saving_what_was_loaded_gives_the_same_bytes(folder, tmp_path):
    save(load(tiny_llama(), folder), tmp_path / "again")
    again = contents(tmp_path / "again")
    assert {*FILES} <= again.keys()
    assert again == contents(folder)


def test_sets_are_saved_in_order(folder):
    assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]


def test_plain_peft_loads_the_mean_without_a_warning(folder, tokens):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # PEFT 0.21 asks transformers 5.24 for a name that it is to lose, whatever is loaded.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        stock = PeftModel.from_pretrained(tiny_llama(), folder)
    assert find_posterior(stock) is None
    model = bayesian()
    with find_posterior(model).mean():
        torch.testing.assert_close(stock.eval()(tokens).logits, model(tokens).logits, rtol=0, atol=0)
    assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))


def test_what_the_description_says(folder):
    import peft

    description = json.loads((folder / "blob_config.json").read_text())
    assert description["format_version"] == 2
    assert description["prior"] == {"family": "normal", "std": 0.3}
    assert description["config"]["estimator"] == "independent"
    assert description["libraries"]["peft"] == peft.__version__
    assert description["libraries"]["torch"] == torch.__version__
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "adapter_model.safetensors").items()):
        digest.update(f"{name} torch.float32 {tuple(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
    assert description["mean_sha256"] == digest.hexdigest()


@pytest.mark.parametrize("name", FILES)
def test_missing_file(name, folder):
    (folder / name).unlink()
    with pytest.raises(AdapterFileError, match=rf"{name} is missing.*(a saved adapter has it|save again)"):
        load(tiny_llama(), folder)


def test_no_folder(tmp_path):
    with pytest.raises(AdapterFileError, match="nowhere: no such folder; give one"):
        load(tiny_llama(), tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "posterior.safetensors"])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_truncated_tensors(name, share, folder):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(AdapterFileError, match=rf"{name}: not readable as safetensors"):
        load(tiny_llama(), folder)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "posterior.safetensors"])
def test_one_altered_value(name, folder):
    flip(folder / name)
    with pytest.raises(AdapterFileError, match=rf"{name}: its SHA-256 is .* altered, or comes from another save"):
        load(tiny_llama(), folder)


@pytest.mark.parametrize("name", FILES)
def test_file_of_another_save(name, folder, tmp_path):
    model = with_lora(tiny_llama(), lora_dropout=0.1)
    bayesianize(model, BlobConfig(prior_std=0.4))
    save(model, tmp_path / "other")
    (folder / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(AdapterFileError, match="comes from another save"):
        load(tiny_llama(), folder)


def test_scaling_is_guarded_and_the_place_of_the_base_model_is_not(folder):
    edit(folder / "adapter_config.json", lambda content: content.update(base_model_name_or_path="/moved/here"))
    load(tiny_llama(), folder)
    edit(folder / "adapter_config.json", lambda content: content.update(lora_alpha=16))
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json: its SHA-256 is"):
        load(tiny_llama(), folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=3), "format_version is 3; this bloblora reads 2"),
        (lambda c: c.pop("format_version"), "format_version is None"),
        (lambda c: c.update(surprise=1), r"unknown fields \['surprise'\]"),
        (lambda c: c.pop("mean_sha256"), r"missing fields \['mean_sha256'\]"),
        (lambda c: c["config"].update(surprise=1), r"field 'config' has unknown fields \['surprise'\]"),
        (lambda c: c["config"].update(prior_std=-1), "prior_std must be a finite number above 0, got -1"),
        (lambda c: c["config"].update(prior_std="wide"), "prior_std must be a finite number above 0, got 'wide'"),
        (lambda c: c["config"].update(estimator="magic"), "estimator must be one of .*, got 'magic'"),
        (lambda c: c["config"].update(estimator=["local"]), r"estimator must be one of .*, got \['local'\]"),
        (lambda c: c["config"].pop("estimator"), "was altered"),
        (lambda c: c.update(config=None), "field 'config' must be an object, got None"),
        (lambda c: c["config"].update(prior_std=0.4), "was altered"),
        (lambda c: c["config"].update(estimator="local"), "was altered"),
        (lambda c: c["prior"].update(std=0.4), "was altered"),
        (lambda c: c["libraries"].update(torch="1.0"), "was altered"),
    ],
)
def test_changed_description(change, message, folder):
    edit(folder / "blob_config.json", change)
    with pytest.raises(AdapterFileError, match=r"blob_config\.json: .*" + message):
        load(tiny_llama(), folder)


def rewrite(file: Path, change) -> None:
    """Another version's description: changed, and hashed by the rule of this format."""

    def change_and_hash(content):
        change(content)
        hashed = json.dumps({k: v for k, v in content.items() if k != "sha256"}, sort_keys=True)
        content["sha256"] = hashlib.sha256(hashed.encode()).hexdigest()

    edit(file, change_and_hash)


def test_a_field_that_an_older_version_lacked_has_its_default(folder):
    rewrite(folder / "blob_config.json", lambda content: [content["config"].pop(name) for name in ("prior", *OVER_A)])
    assert find_posterior(load(tiny_llama(), folder)).config == CONFIG


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda c: c["config"].update(jitter=0.1), "field 'config' has unknown fields ['jitter']"),
        (lambda c: c.update(jitter=0.1), "unknown fields ['jitter']"),
        (lambda c: c.update(format_version=7), "format_version is 7; this bloblora reads 2"),
    ],
)
def test_a_field_of_a_newer_version_is_named_with_that_version(change, found, folder):
    rewrite(
        folder / "blob_config.json", lambda content: (content["libraries"].update(bloblora="9.8.7"), change(content))
    )
    versions = f"bloblora 9.8.7 wrote it, this is {version('bloblora')}"
    with pytest.raises(AdapterFileError, match=f"{re.escape(found)}; {re.escape(versions)}"):
        load(tiny_llama(), folder)


def test_a_folder_that_an_older_version_wrote(tokens):
    """Of format 2, by commit b125365, whose BlobConfig lacked ``prior_kwargs``; the logits are that commit's too."""
    folder = Path(__file__).parent / "fixtures" / "format2"
    expected = json.loads(folder.with_suffix(".json").read_text())
    model = load(tiny_llama(), folder)
    posterior = find_posterior(model)
    assert posterior.config == BlobConfig(**OVER_A | expected["config"])
    ids = torch.tensor([expected["tokens"]])
    for name, context in (("mean", posterior.mean()), ("draw", posterior.draw(expected["draw_seed"]))):
        with torch.no_grad(), context:
            logits = model(ids).logits[0, -1, :12]
        torch.testing.assert_close(logits, torch.tensor(expected[f"{name}_logits"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["blob_config.json", "adapter_config.json"])
@pytest.mark.parametrize(
    ("content", "message"), [(b'{"a":', "not readable as JSON"), (b"\xff\xfe", "not readable"), (b"[1]", "JSON object")]
)
def test_not_json(name, content, message, folder):
    (folder / name).write_bytes(content)
    with pytest.raises(AdapterFileError, match=rf"{name}: .*{message}"):
        load(tiny_llama(), folder)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (dict(hidden_size=64), "doesn't fit LlamaForCausalLM; load it onto the model that it was trained on: .*size"),
        (dict(num_hidden_layers=1), r"posterior\.safetensors: its layers aren't the model's; .*unknown .*layers\.1\."),
    ],
)
def test_another_base_model(base, message, folder):
    with pytest.raises(AdapterFileError, match=f"(?s){message}"):
        load(tiny_llama(**base), folder)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_base_model_with_more_layers(folder):
    with pytest.raises(AdapterFileError, match=r"posterior\.safetensors: .*missing \['.*layers\.2\."):
        load(tiny_llama(num_hidden_layers=3), folder)


def test_base_model_without_the_layers(folder):
    base = BertForSequenceClassification(
        BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    )
    with pytest.raises(AdapterFileError, match="doesn't fit BertForSequenceClassification"):
        load(base, folder)


def test_loading_into_a_posterior_that_is_there(folder, tokens):
    model = bayesian(BlobConfig(prior_std=0.7, init_std=0.01, estimator="local"))
    load_posterior(model, folder)
    torch.testing.assert_close(drawn(model, tokens), drawn(bayesian(), tokens), rtol=0, atol=0)
    assert find_posterior(model).config.prior_std == 0.7
    with pytest.raises(AdapterFileError, match="std_parameterization is 'log', the model's posterior has 'softplus'"):
        load_posterior(bayesian(BlobConfig(std_parameterization="softplus")), folder)
    with pytest.raises(AdapterFileError, match="the model's adapter isn't Bayesian"):
        load_posterior(with_lora(tiny_llama()), folder)


def test_loading_into_a_posterior_of_another_shape(folder, tmp_path):
    wide = bayesian(hidden_size=64)
    with pytest.raises(AdapterFileError, match=r"q_proj.lora_A has shape \(4, 32\), the model's has \(4, 64\)"):
        load_posterior(wide, folder)
    save(with_lora(tiny_llama()), tmp_path / "plain")
    with pytest.raises(AdapterFileError, match=r"blob_config\.json is missing: this is a plain LoRA"):
        load_posterior(wide, tmp_path / "plain")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_values_come_back(dtype, tmp_path):
    model = bayesian().to(dtype)
    save(model, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "posterior.safetensors").values()} == {dtype}
    loaded = find_posterior(load(tiny_llama().to(dtype), tmp_path))
    before = find_posterior(model)
    for name, mean in before.named_means().items():
        assert torch.equal(loaded.named_means()[name], mean.float())
        assert torch.equal(loaded.named_std_parameters()[name], before.named_std_parameters()[name].float())


def test_another_adapter_name(tokens, tmp_path):
    model = bayesian()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    bayesianize(model, BlobConfig(prior_std=0.9), "second")
    save(model, tmp_path, "second")
    assert {*FILES} <= contents(tmp_path).keys()
    loaded = load(tiny_llama(), tmp_path, "third")
    assert find_posterior(loaded, "third").config.prior_std == 0.9
    model.set_adapter("second")
    model.eval()
    assert torch.equal(drawn(loaded, tokens), drawn(model, tokens))


def test_modules_to_save_come_back(tokens, tmp_path):
    def base():
        torch.manual_seed(1)
        sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
        return BertForSequenceClassification(BertConfig(vocab_size=97, **sizes))

    model = with_lora(base(), ("query",), task_type="SEQ_CLS").eval()
    bayesianize(model, CONFIG)
    head = model.base_model.model.classifier.modules_to_save["default"]
    torch.nn.init.normal_(head.weight)
    save(model, tmp_path)
    loaded = load(base(), tmp_path)
    assert torch.equal(loaded.base_model.model.classifier.modules_to_save["default"].weight, head.weight)
    assert torch.equal(drawn(loaded, tokens), drawn(model, tokens))


def test_plain_adapter(tokens, tmp_path):
    model = with_lora(tiny_llama()).eval()
    save(model, tmp_path)
    assert "blob_config.json" not in contents(tmp_path)
    loaded = load(tiny_llama(), tmp_path)
    assert find_posterior(loaded) is None
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_a_plain_adapter_replaces_a_bayesian_one(folder):
    save(with_lora(tiny_llama()), folder)
    assert find_posterior(load(tiny_llama(), folder)) is None
    assert contents(folder).keys().isdisjoint({"blob_config.json", "posterior.safetensors"})


def test_other_files_stay(folder):
    (folder / "README.md").write_text("mine")
    (folder / "task.json").write_text("{}")
    save(bayesian(seed=1), folder)
    assert (folder / "README.md").read_text() == "mine"
    assert contents(folder).keys() == {*FILES, "README.md", "task.json"}


def test_a_save_that_fails_leaves_the_old_adapter(folder):
    before = contents(folder)
    model = bayesian(seed=1)
    layer = next(iter(find_posterior(model).named_layers().values()))
    # No data, so that writing the posterior fails, after PEFT has written the mean.
    layer.blob_std_parameter_A["default"] = torch.nn.Parameter(torch.empty(4, 32, device="meta"))
    with pytest.raises(NotImplementedError, match="meta"):
        save(model, folder)
    assert contents(folder) == before


@pytest.mark.parametrize("moved", range(len(FILES) + 1))
def test_a_save_cut_off_between_two_files_is_the_new_adapter(moved, folder, tokens, tmp_path):
    new = bayesian(seed=1)
    save(new, tmp_path / "new")
    (tmp_path / "new").rename(folder / ".saved")  # complete, and only some of its files are in place
    for name in FILES[:moved]:
        (folder / name).write_bytes((folder / ".saved" / name).read_bytes())
    assert torch.equal(load(tiny_llama(), folder)(tokens).logits, new(tokens).logits)
    newest = bayesian(seed=2)
    save(newest, folder)
    assert torch.equal(load(tiny_llama(), folder)(tokens).logits, newest(tokens).logits)
    assert contents(folder).keys() == {*FILES, "README.md"}


def save_forever(folder: Path) -> None:
    models = [bayesian(seed=seed) for seed in range(2)]
    while True:
        for model in models:
            save(model, folder)


def wait_for(folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not folder.exists():
        assert time.monotonic() < deadline, f"no {folder.name} in two minutes of saving"


@pytest.mark.parametrize("rounds", [1, pytest.param(6, marks=pytest.mark.long)])
def test_killed_while_saving(tokens, tmp_path, rounds):
    """However often a process is killed, while it writes or while it moves, one of the two adapters is there, whole."""
    save(bayesian(seed=0), tmp_path)
    versions = [bayesian(seed=seed)(tokens).logits for seed in range(2)]
    context = multiprocessing.get_context("forkserver")  # imports torch once for all the processes
    context.set_forkserver_preload([__name__])
    cut_off = 0
    for phase in [".saving", ".saved"] * rounds:
        process = context.Process(target=save_forever, args=(tmp_path,), daemon=True)
        process.start()
        # The last kill may have left it; then the first save ends it.
        while process.is_alive() and (tmp_path / phase).exists():
            pass
        wait_for(tmp_path / phase)
        process.kill()
        process.join()
        cut_off += any(file.name.startswith(".") for file in tmp_path.iterdir())
        logits = load(tiny_llama(), tmp_path)(tokens).logits
        assert any(torch.equal(logits, version) for version in versions)
    assert cut_off, "no kill hit a save"
    save(bayesian(seed=0), tmp_path)
    assert contents(tmp_path).keys() == {*FILES, "README.md"}


def test_load_wants_a_model_without_an_adapter(tmp_path):
    model = with_lora(tiny_llama())
    bayesianize(model)
    save(model, tmp_path)
    for taken in (model, model.get_base_model()):
        with pytest.raises(ValueError, match=r"base_model: \w+ has an adapter already; pass the base model: a fresh"):
            load(taken, tmp_path)
    assert find_posterior(load(model.unload(), tmp_path)) is not None
