"""BLoB inside PEFT models of many kinds: what a forward is in each mode, and what PEFT does around it."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from bloblora import BlobConfig, bayesianize, find_posterior
from tests.conftest import tiny_llama, with_lora

CONFIG = BlobConfig(init_std=0.5)
SMALL = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)


def decoder(kind):
    torch.manual_seed(1)
    if kind == "llama":
        return tiny_llama(), ("q_proj", "v_proj")
    if kind == "qwen":
        return Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2)), ("q_proj", "v_proj")
    if kind == "gemma":
        return Gemma2ForCausalLM(Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8)), (
            "q_proj",
            "v_proj",
        )
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, **no_dropout)), (
        "c_attn",
    )


def encoder(kind):
    torch.manual_seed(1)
    dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3)
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(**SMALL, **dropout)), ("query", "value")
    return RobertaForSequenceClassification(RobertaConfig(**SMALL, **dropout)), ("query", "value")


def model_of(kind):
    base, targets = encoder(kind) if kind in ("bert", "roberta") else decoder(kind)
    return with_lora(base, targets)


@pytest.mark.parametrize("kind", ["llama", "qwen", "gemma", "gpt2", "bert", "roberta"])
def test_modes_of_a_forward(kind, tokens):
    model = model_of(kind)
    model.eval()
    plain = model(tokens).logits
    posterior = bayesianize(model, CONFIG)
    torch.testing.assert_close(model(tokens).logits, plain)  # eval mode is the mean
    model.train()
    assert (model(tokens).logits - model(tokens).logits).abs().max() > 1e-4  # train mode draws
    with posterior.mean():
        torch.testing.assert_close(model(tokens).logits, plain)
    with posterior.draw(0):
        first = model(tokens).logits
        torch.testing.assert_close(model(tokens).logits, first)
        torch.testing.assert_close(model(tokens[1:2]).logits[0], first[1], rtol=1e-4, atol=1e-5)
    with posterior.draw(1):
        assert (model(tokens).logits - first).abs().max() > 1e-4
    with posterior.draw(0):
        torch.testing.assert_close(model(tokens).logits, first)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_merge_and_unload_of_the_mean_and_of_a_draw(kind, tokens):
    model = model_of(kind).eval()
    posterior = bayesianize(model, CONFIG)
    mean = model(tokens).logits
    with posterior.draw(7):
        drawn = model(tokens).logits
        model.merge_adapter()
    torch.testing.assert_close(model(tokens).logits, drawn, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()  # outside of the draw: takes out what was put in
    torch.testing.assert_close(model(tokens).logits, mean, rtol=1e-4, atol=1e-5)
    copied = copy.deepcopy(model)
    with find_posterior(copied).draw(7):
        torch.testing.assert_close(copied.merge_and_unload(safe_merge=True)(tokens).logits, drawn, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(tokens).logits, mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.filterwarnings("ignore:.*tied")
def test_lm_head_as_a_target(tied, tokens):
    model = with_lora(tiny_llama(tie_word_embeddings=tied), ("q_proj", "lm_head")).eval()
    posterior = bayesianize(model, CONFIG)
    assert any(name.endswith("lm_head") for name in posterior.named_layers())
    with posterior.draw(3):
        drawn = model(tokens).logits
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, drawn, rtol=1e-4, atol=1e-5)


def test_merging_a_tied_head_says_that_it_is_untied(tokens):
    model = with_lora(tiny_llama(tie_word_embeddings=True), ("lm_head",)).eval()
    bayesianize(model, CONFIG)
    embeddings = model.get_input_embeddings().weight.clone()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged.get_input_embeddings().weight, embeddings)
    assert merged.config.tie_word_embeddings is False


def test_several_adapters(tokens):
    model = with_lora(tiny_llama())
    first = bayesianize(model, CONFIG)
    model.add_adapter("plain", LoraConfig(r=4, target_modules=["q_proj"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    second = bayesianize(model, CONFIG, "second")
    assert first.named_layers().keys() > second.named_layers().keys()
    model.eval()
    outputs = {}
    for name in ("default", "plain", "second"):
        model.set_adapter(name)
        outputs[name] = model(tokens).logits
        assert (find_posterior(model) is None) == (name == "plain")
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert all(f".{name}" in n for n in trainable)
        assert any("blob_std_parameter" in n for n in trainable) == (name != "plain")
    with model.disable_adapter():
        base = model(tokens).logits
    torch.testing.assert_close(outputs["plain"], base)  # its B is zero
    assert (outputs["default"] - base).abs().max() > 1e-3
    model.delete_adapter("second")
    assert not any(".second" in name for name, _ in model.named_parameters())


def test_trained_lora_keeps_its_mean_and_modules_to_save_stay_deterministic(tokens):
    base, targets = encoder("bert")
    model = with_lora(base, targets, task_type="SEQ_CLS")
    means = {n: p.clone() for n, p in model.named_parameters() if "lora_A" in n}
    posterior = bayesianize(model, CONFIG)
    assert all(torch.equal(p, means[n]) for n, p in model.named_parameters() if n in means)
    assert not any("classifier" in name for name in posterior.named_layers())
    assert any("classifier" in n and p.requires_grad for n, p in model.named_parameters())


def test_gradient_checkpointing_replays_the_noise(tokens):
    gradients = []
    for checkpointing in (False, True):
        model = with_lora(tiny_llama())
        torch.manual_seed(0)
        bayesianize(model, CONFIG)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(11)
        model(tokens, labels=tokens).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_bfloat16_base_keeps_a_float32_posterior(tokens):
    model = with_lora(tiny_llama().to(torch.bfloat16))
    posterior = bayesianize(model, CONFIG)
    assert {p.dtype for p in (*posterior.named_means().values(), *posterior.named_std_parameters().values())} == {
        torch.float32
    }
    model.train()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in posterior.named_std_parameters().values())
    with posterior.draw(0):
        assert model(tokens).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("estimator", ["independent", "flipout", "shared", "local"])
def test_compile_has_no_graph_break(estimator, tokens):
    model = with_lora(tiny_llama())
    posterior = bayesianize(model, BlobConfig(init_std=0.5, estimator=estimator))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.train()
    compiled(tokens).logits.sum().backward()
    assert all(p.grad is not None for p in posterior.named_std_parameters().values())
    model.eval()
    torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
    with posterior.draw(0):
        torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(target_modules=["embed_tokens", "q_proj"]), "embed_tokens: LoRA on an embedding"),
        (dict(target_modules=["q_proj"], use_dora=True), "variant Dora"),
    ],
)
def test_what_cannot_be_bayesian_is_named(options, message):
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, **options))
    with pytest.raises(ValueError, match=message):
        bayesianize(model)


def test_clear_errors_of_arguments():
    model = with_lora(tiny_llama())
    with pytest.raises(TypeError, match="PEFT model"):
        bayesianize(tiny_llama())
    with pytest.raises(ValueError, match="no adapter 'other'; the model has default"):
        bayesianize(model, adapter_name="other")
    bayesianize(model)
    with pytest.raises(ValueError, match="Bayesian already"):
        bayesianize(model)
    with pytest.raises(ValueError, match=r"prior_std must be a finite number above 0, got -1"):
        BlobConfig(prior_std=-1)
    with pytest.raises(ValueError, match="estimator must be one of independent, flipout, shared, local, got 'x'"):
        BlobConfig(estimator="x")


def test_summary_at_the_prior():
    model = with_lora(tiny_llama())
    posterior = bayesianize(model, BlobConfig(prior_std=0.2))
    with torch.no_grad():
        for parameter in posterior.named_std_parameters().values():
            parameter.fill_(0.2**0.5)
        for mean in posterior.named_means().values():
            mean.zero_()
    summary = posterior.summary()
    assert summary["share_at_prior"] == 1
    assert summary["kl"] == pytest.approx(0, abs=1e-3)
    assert summary["median_std"] == pytest.approx(0.2)
