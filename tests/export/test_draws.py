"""An exported draw is the draw of `predict`: stock PEFT and plain transformers give its logits."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from bloblora import runs, tasks
from bloblora.adapter import find_posterior
from bloblora.export import export, read_manifest
from tests.tiny_base import QUESTIONS, queries

pytestmark = pytest.mark.usefixtures("one_thread")

RECORDS = {"questions": QUESTIONS, "texts": queries()}
HEAD = {"factors": "none", "head_prior_std": "auto"}
ADAPTERS = (
    "lora",
    "map",
    "mc-dropout",
    "ensemble",
    "mixture",
    "bbb",
    "blob",
    "blob-symmetric",
    "blob-b",
    "tfb",
    "scalabl",
)
POINTS = ("lora", "map", "distilled")
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # PEFT scales B(A x), `BlobVariant` A x: sums are rounded elsewhere


def log_probs(model, task, records, tokenizer):
    """Of one function, by the task's own logits."""
    unlabelled = [{k: v for k, v in record.items() if k not in ("label", "answer")} for record in records]
    batch = task.collate(tasks.encode_all(task, unlabelled, tokenizer))
    with torch.no_grad():
        return task.logits(model.eval(), batch).float().log_softmax(-1)


def stock(folder, name, num_labels=None):
    """The base model with an exported adapter, as a user of PEFT loads it."""
    kind = AutoModelForCausalLM if num_labels is None else AutoModelForSequenceClassification
    options = {} if num_labels is None else {"num_labels": num_labels, "pad_token_id": 0}
    base = kind.from_pretrained(read_manifest(folder).base_model, **options)
    return PeftModel.from_pretrained(base, folder / name)


@pytest.mark.parametrize("method", [*ADAPTERS, "swag", "ivon", "distilled"])
def test_stock_peft_gives_the_draws(method, run_of, tmp_path):
    if method == "ivon":
        pytest.importorskip("ivon")
    directory = run_of(method)
    manifest = export(directory, tmp_path / "out", num_samples=3, seed=5)
    run = runs.load_run(directory)
    expected, mean = run.predict(QUESTIONS, 3, seed=5).log_probs, run.predict(QUESTIONS, 0).log_probs
    assert len(manifest.draws) == len(expected) == (1 if method in POINTS else 2 if method == "ensemble" else 3)
    if len(expected) > 1:
        assert not torch.allclose(expected[0], expected[1], **TOLERANCE)
    for name, row in zip([manifest.mean, *manifest.draws], [*mean, *expected], strict=True):
        found = log_probs(stock(tmp_path / "out", name), run.task, QUESTIONS, run.tokenizer)
        torch.testing.assert_close(found, row, **TOLERANCE)


def test_a_draw_is_the_posteriors_draw(run_of, tmp_path):
    """Also without `predict`: in `posterior.draw`, with the generator where the seed puts it."""
    directory = run_of("blob")
    export(directory, tmp_path / "out", num_samples=2, seed=7)
    run = runs.load_run(directory)
    generator = torch.Generator().manual_seed(7)
    for name in ("draw_00", "draw_01"):
        with find_posterior(run.model).draw(generator):
            expected = log_probs(run.model, run.task, QUESTIONS, run.tokenizer)
        found = log_probs(stock(tmp_path / "out", name), run.task, QUESTIONS, run.tokenizer)
        torch.testing.assert_close(found, expected, **TOLERANCE)


def test_a_classification_head_is_exported_for_peft(run_of, tmp_path):
    directory = run_of("blob", "texts")
    manifest = export(directory, tmp_path / "out", num_samples=2)
    run = runs.load_run(directory)
    for name, row in zip(manifest.draws, run.predict(queries(), 2).log_probs, strict=True):
        found = log_probs(stock(tmp_path / "out", name, num_labels=2), run.task, queries(), run.tokenizer)
        torch.testing.assert_close(found, row, **TOLERANCE)
    assert "classification head" in manifest.warnings[0]
    assert manifest.commands == {}


@pytest.mark.parametrize(
    ("method", "kind", "draw", "options"),
    [
        ("blob", "questions", None, {}),
        ("blob", "questions", 2, {}),
        ("blob", "questions", 1, {"target_modules": ["q_proj", "lm_head"]}),
        ("lora", "questions", None, {"target_modules": ["lm_head"]}),
        ("blob", "texts", 1, {}),
        ("ensemble", "texts", 1, {}),
        ("mc-dropout", "questions", 0, {}),
        ("full", "texts", None, {}),
        ("laplace-lora", "questions", None, {}),
        ("blob", "texts", None, HEAD),
    ],
)
def test_a_merged_model_needs_no_adapter(method, kind, draw, options, run_of, tmp_path):
    directory = run_of(method, kind, **options)
    export(directory, tmp_path / "out", "merged", seed=5, draw=draw)
    auto = AutoModelForCausalLM if kind == "questions" else AutoModelForSequenceClassification
    model = auto.from_pretrained(tmp_path / "out")
    run = runs.load_run(directory)
    prediction = run.predict(RECORDS[kind], 0 if draw is None else draw + 1, seed=5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    found = log_probs(model, run.task, RECORDS[kind], tokenizer)
    torch.testing.assert_close(found, prediction.log_probs[-1], **TOLERANCE)
    if kind == "texts":
        assert model.config.id2label == dict(enumerate(run.task.labels))


@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_head_leaves_the_embedding_alone(tied, tmp_path):
    from types import SimpleNamespace

    from bloblora.export.writers import write_merged
    from bloblora.methods import Draw
    from tests.tasks.conftest import tiny_causal, train_tokenizer, with_lora

    base = tiny_causal(tie_word_embeddings=tied)
    embedding = base.get_input_embeddings().weight.clone()
    model = with_lora(base, "lm_head")
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = model(tokens).logits
    run = SimpleNamespace(model=model, task=tasks.ChoiceText(pad_token_id=0), tokenizer=train_tokenizer())
    write_merged(run, Draw("mean", "default"), tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, expected, **TOLERANCE)


def test_half_precision_rounds_the_tensors(run_of, tmp_path):
    from safetensors.torch import load_file

    whole, half = tmp_path / "whole", tmp_path / "half"
    export(run_of("blob"), whole, num_samples=1)
    export(run_of("blob"), half, num_samples=1, dtype="bfloat16")
    exact, rounded = (load_file(folder / "draw_00" / "adapter_model.safetensors") for folder in (whole, half))
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
    for name, tensor in exact.items():
        assert torch.equal(tensor.bfloat16(), rounded[name])
    stock(half, "draw_00")


@pytest.mark.parametrize(
    ("method", "options", "arguments", "message"),
    [
        ("laplace-lora", {}, {}, "method 'laplace-lora': a draw of a linearized model is no adapter; export its mean"),
        ("c-lora", {}, {"num_samples": 0}, "method 'c-lora': its ΔW depends on the input, .* export a run of another"),
        ("blob", {"kind": "texts", **HEAD}, {}, "the Gaussian is over the classification head alone.* export its mean"),
        ("full", {}, {}, "method 'full' changes all weights and has no adapter; use --format merged"),
        ("lora", {}, {"format": "merged", "draw": 1}, "draw must be below 1, .* got 1"),
        ("full", {}, {"format": "merged", "draw": 1}, "draw must be below 1, .* got 1"),
        ("ensemble", {}, {"format": "merged", "draw": 2}, "draw must be below 2, .* got 2"),
        ("lora", {}, {"draw": 0}, "draw must be 0 or more, and is for format 'merged'; got 0 with 'lora'"),
        ("lora", {}, {"format": "onnx"}, "format 'onnx' is not one of lora, merged, gguf"),
        ("lora", {}, {"dtype": "int8"}, "dtype 'int8' is not one of float32, "),
        ("lora", {}, {"num_samples": -1}, r"samples must be 0 \(the mean\) or more, got -1"),
        ("lora", {"kind": "texts"}, {"format": "gguf"}, "classification head has no place in a LoRA's GGUF"),
    ],
)
def test_what_cannot_be_exported(method, options, arguments, message, run_of, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(run_of(method, **options), tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["lora", "merged", "gguf"])
@pytest.mark.filterwarnings("ignore:temperature_scaling:UserWarning")
def test_a_temperature_is_in_the_manifest(format, run_of, tmp_path):
    directory = run_of("blob", temperature_scaling=True, validation=0.5)
    export(directory, tmp_path / "out", format, num_samples=2)
    manifest, run = read_manifest(tmp_path / "out"), runs.load_run(directory)
    of_export = run.sampler.temperature_of_mean if format == "merged" else run.sampler.temperature
    assert manifest.temperature == of_export != 1
    assert manifest.temperature_of_mean == run.sampler.temperature_of_mean
    of_mean = "" if format == "merged" else f" ({manifest.temperature_of_mean:.4g} for the mean alone)"
    assert f"temperature {manifest.temperature:.4g}{of_mean} divides the logits" in manifest.warnings[-1]
    if format == "lora":  # the draws' logits over T are those of `predict`
        for name, row in zip(manifest.draws, run.predict(QUESTIONS, 2).log_probs, strict=True):
            found = log_probs(stock(tmp_path / "out", name), run.task, QUESTIONS, run.tokenizer)
            torch.testing.assert_close((found / manifest.temperature).log_softmax(-1), row, rtol=1e-3, atol=1e-3)


def test_laplace_has_a_mean(run_of, tmp_path):
    directory = run_of("laplace-lora")
    manifest = export(directory, tmp_path / "out", num_samples=0)
    assert manifest.draws == []
    run = runs.load_run(directory)
    found = log_probs(stock(tmp_path / "out", "mean"), run.task, QUESTIONS, run.tokenizer)
    torch.testing.assert_close(found, run.predict(QUESTIONS, 0).log_probs[0], **TOLERANCE)
