"""BLoB inside PEFT models of many kinds: what a forward is in each mode, and what PEFT does around it."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
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
from tests.conftest import OVER_A, tiny_llama, with_lora

CONFIG = BlobConfig(init_std=0.25, **OVER_A)
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
def test_compile_has_no_graph_break_in_training(estimator, tokens):
    model = with_lora(tiny_llama(num_hidden_layers=1), ("v_proj",))
    posterior = bayesianize(model, BlobConfig(init_std=0.25, estimator=estimator))
    compiled = torch.compile(model.train(), fullgraph=True, backend="eager")
    torch.manual_seed(7)
    logits = compiled(tokens).logits
    logits.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in posterior.named_std_parameters().values())
    torch.manual_seed(7)
    torch.testing.assert_close(logits, model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_compile_has_no_graph_break_in_prediction(tokens):
    model = with_lora(tiny_llama(num_hidden_layers=1), ("v_proj",)).eval()
    posterior = bayesianize(model, CONFIG)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
    with posterior.draw(0):
        torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_copies(tokens):
    model = with_lora(tiny_llama()).eval()
    posterior = bayesianize(model, CONFIG)
    copied = copy.deepcopy(model)
    of_copy = find_posterior(copied)
    with posterior.draw(3):
        drawn = model(tokens).logits
        with of_copy.draw(3):
            assert torch.equal(copied(tokens).logits, drawn)
        model_of_draw = copy.deepcopy(model).merge_and_unload()  # while autograd records the draw
    torch.testing.assert_close(model_of_draw(tokens).logits, drawn, rtol=1e-4, atol=1e-5)
    before = posterior.kl().item()
    with torch.no_grad():
        for parameter in (*of_copy.named_means().values(), *of_copy.named_std_parameters().values()):
            parameter.mul_(2)
    assert posterior.kl().item() == before  # nothing is shared
    assert of_copy.kl().item() != before


def test_a_batch_of_several_adapters(tokens):
    model = with_lora(tiny_llama())
    bayesianize(model, CONFIG)
    model.add_adapter("plain", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    second = bayesianize(model, CONFIG, "second")
    model.eval()
    names = ["default", "plain", "__base__", "second"]
    with find_posterior(model).draw(0), second.draw(1):
        mixed = model(tokens, adapter_names=names).logits
        for row, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(tokens).logits
            else:
                model.set_adapter(name)
                alone = model(tokens).logits
            torch.testing.assert_close(mixed[row], alone[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_moving_to_another_dtype(dtype, tokens):
    model = with_lora(tiny_llama())
    posterior = bayesianize(model, CONFIG)
    expected = posterior.kl().item()
    model.to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert posterior.kl().item() == pytest.approx(expected, rel=2e-3)
    assert posterior.kl().dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    model.train()
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad.dtype == dtype for parameter in posterior.named_std_parameters().values())
    with posterior.draw(0):
        assert model(tokens).logits.dtype == dtype


def test_moving_to_another_device():
    model = with_lora(tiny_llama())
    posterior = bayesianize(model, CONFIG)
    model.to("meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert all(parameter.is_meta for parameter in posterior.named_std_parameters().values())


def test_std_parameters_are_trainable_and_counted():
    model = with_lora(tiny_llama())
    counted, _ = model.get_nb_trainable_parameters()
    posterior = bayesianize(model, CONFIG)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {f"{name}.blob_std_parameter_A.default" for name in posterior.named_layers()} <= trainable
    entries = 2 * (4 * 32 + 4 * 32)  # layers; q and v, r·n each
    assert model.get_nb_trainable_parameters()[0] == counted + entries
    assert posterior.summary()["num_parameters"] == entries


def test_print_trainable_parameters(capsys):
    model = with_lora(tiny_llama())
    bayesianize(model, CONFIG)
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: 1,408 ||")  # 896 of A and B, 512 of Ω


def test_a_frozen_adapter_has_a_frozen_std_until_both_are_set_to_train():
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], inference_mode=True))
    posterior = bayesianize(model, CONFIG)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.set_adapter("default")
    assert all(p.requires_grad for p in (*posterior.named_means().values(), *posterior.named_std_parameters().values()))


def test_an_adapter_of_the_same_name_after_deletion_is_plain():
    model = with_lora(tiny_llama())
    bayesianize(model, CONFIG)
    model.delete_adapter("default")
    assert find_posterior(model) is None
    assert not any("blob_std_parameter" in name for name, _ in model.named_parameters())
    model.add_adapter("default", LoraConfig(r=2, target_modules=["q_proj"]))
    assert find_posterior(model) is None
    assert {tuple(std.shape) for std in bayesianize(model, CONFIG).named_stds().values()} == {(2, 32)}


def test_draws_nest_and_end_with_an_error(tokens):
    model = with_lora(tiny_llama()).eval()
    posterior = bayesianize(model, CONFIG)
    mean = model(tokens).logits
    with posterior.draw(0):
        outer = model(tokens).logits
        with posterior.mean():
            assert torch.equal(model(tokens).logits, mean)
        assert torch.equal(model(tokens).logits, outer)
        with pytest.raises(KeyError), posterior.draw(1):
            raise KeyError
        assert torch.equal(model(tokens).logits, outer)
    assert torch.equal(model(tokens).logits, mean)


def test_a_merged_adapter_cannot_become_bayesian():
    model = with_lora(tiny_llama())
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"q_proj: is merged into the base weight; call model\.unmerge_adapter"):
        bayesianize(model)


def test_a_base_layer_without_a_weight_and_a_base_without_embeddings():
    """Some quantized layers have none; neither may be taken for a tied head."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(6, 5)

        def forward(self, x):
            return self.head(x)

    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["head"], init_lora_weights=False)).eval()
    base = model.base_model.model.head.base_layer
    weight = base.weight
    del base._parameters["weight"]
    posterior = bayesianize(model, CONFIG)
    base.weight = weight
    x = torch.randn(3, 6)
    with posterior.draw(0):
        drawn = model(x)
        torch.testing.assert_close(model.merge_and_unload()(x), drawn)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(target_modules=["q_proj"], use_dora=True), "q_proj: uses .* switch use_dora off in LoraConfig"),
        (
            dict(target_modules=[], target_parameters=["q_proj.weight"]),
            r"q_proj: LoRA on the parameter 'weight'.* has no product to draw",
        ),
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
    for config in ({"prior_std": 0.1}, LoraConfig()):
        with pytest.raises(TypeError, match=r"config must be a bloblora\.BlobConfig, as .*, got "):
            bayesianize(model, config)
    vera = get_peft_model(tiny_llama(), VeraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"'default' is of type VERA; it must be LORA, made with peft\.LoraConfig"):
        bayesianize(vera)
    bayesianize(model)
    with pytest.raises(ValueError, match="Bayesian already"):
        bayesianize(model)
    with pytest.raises(ValueError, match=r"prior_std must be a finite number above 0, got -1"):
        BlobConfig(prior_std=-1)
    with pytest.raises(ValueError, match="estimator must be one of independent, flipout, shared, local, got 'x'"):
        BlobConfig(estimator="x")


@pytest.mark.parametrize(("init_std", "start"), [(None, 0.0075), (0.01, 0.01)])
def test_where_the_std_starts(init_std, start):
    posterior = bayesianize(with_lora(tiny_llama()), BlobConfig(prior_std=0.3, init_std=init_std))
    stds = torch.cat([std.flatten() for std in posterior.named_stds().values()])
    assert start / 2 <= stds.min() < 0.55 * start
    assert 0.95 * start < stds.max() <= start * (1 + 1e-6)


def test_summary_at_the_prior():
    model = with_lora(tiny_llama())
    posterior = bayesianize(model, BlobConfig(prior_std=0.2))
    with torch.no_grad():
        for parameter in posterior.named_std_parameters().values():
            parameter.fill_(math.log(0.2))
        for mean in posterior.named_means().values():
            mean.zero_()
    summary = posterior.summary()
    assert summary["share_at_prior"] == 1
    assert summary["kl"] == pytest.approx(0, abs=1e-3)
    assert summary["median_std"] == pytest.approx(0.2)


@pytest.mark.parametrize("parameterization", ["log", "softplus", "square"])
def test_stds_are_set_by_name_or_all_alike(parameterization):
    posterior = bayesianize(with_lora(tiny_llama()), BlobConfig(std_parameterization=parameterization))
    rows = {name: torch.rand(len(mean), 1) + 0.01 for name, mean in posterior.named_means().items()}
    posterior.set_stds(rows)
    for name, std in posterior.named_stds().items():
        torch.testing.assert_close(std, rows[name].expand_as(std))
    posterior.set_stds(0.05)
    assert all(torch.allclose(std, torch.tensor(0.05)) for std in posterior.named_stds().values())


def test_the_priors_width_is_a_matter_of_units():
    """σp, M and Ω times c, and B over c: the same functions and the same KL, for B has no prior."""
    ids, found = torch.randint(0, 97, (2, 7), generator=torch.Generator().manual_seed(0)), []
    for factor in (1.0, 3.0):
        model = with_lora(tiny_llama())
        posterior = bayesianize(model, BlobConfig(prior_std=0.2 * factor, init_std=0.1 * factor))
        with torch.no_grad():
            for layer in posterior.named_layers().values():
                layer.lora_A["default"].weight.mul_(factor)
                layer.lora_B["default"].weight.div_(factor)
            posterior.set_stds(0.15 * factor)
            with posterior.draw(5):
                found.append((model.eval()(ids).logits, posterior.kl()))
    (logits, kl), (expected, expected_kl) = found
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kl, expected_kl, rtol=1e-4, atol=0)
