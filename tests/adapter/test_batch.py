"""Noise where a layer doesn't see (b, T, n): flattened tokens, experts, texts that are packed into one row."""

import copy
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from bloblora import BlobConfig, bayesianize
from bloblora.methods import METHODS
from tests.conftest import tiny_llama, with_lora

SHARED = ["shared_expert.up_proj", "shared_expert.gate_proj"]


def qwen_moe(**overrides):
    torch.manual_seed(1)
    sizes = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**{**sizes, **experts, **overrides}))


def opt():
    sizes = dict(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_dim=64)
    return OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0))


def noise_of(layer, posterior, model, **inputs):
    """What the noise added to A x of each token in one forward in train mode, over |x|: (rows, r), and x."""
    seen = {}

    def keep(module, arguments, output):
        seen.update(x=arguments[0].detach())

    handle = layer.register_forward_hook(keep)
    variant = layer.lora_variant["default"]
    project = variant.project
    variant.project = lambda *a: seen.setdefault("h", project(*a))
    model.train()(**inputs)
    del variant.project
    handle.remove()
    x = seen["x"].flatten(0, -2)
    with torch.no_grad():
        mean = x @ layer.lora_A["default"].weight.T
    return (seen["h"].flatten(0, -2) - mean).detach(), x


def same_weights(noise, x):
    """Whether one E∘Ω makes the noise of these rows, more than there are unknowns: a least-squares fit is exact."""
    fit = torch.linalg.lstsq(x.double(), noise.double()).solution
    return (x.double() @ fit - noise).norm() < 1e-4 * noise.norm()


@pytest.mark.parametrize("estimator", ["independent", "flipout"])
@pytest.mark.parametrize(("base", "target"), [(qwen_moe, SHARED[0]), (opt, "fc1")])
def test_flattened_tokens_have_the_noise_of_their_example(base, target, estimator):
    model = with_lora(base(), [target])
    posterior = bayesianize(model, BlobConfig(init_std=0.3, estimator=estimator))
    layer = next(iter(posterior.named_layers().values()))
    ids = torch.randint(3, 97, (3, 48))
    noise, x = noise_of(layer, posterior, model, input_ids=ids)
    assert x.shape[0] == 3 * 48
    for k in range(3):
        assert same_weights(noise[48 * k : 48 * k + 48], x[48 * k : 48 * k + 48])
    assert not same_weights(noise, x)


@pytest.mark.parametrize("method", ["scalabl", "c-lora"])
def test_other_noise_of_flattened_tokens(method):
    """Tokens that repeat have one value in an example, another in the next."""
    method = METHODS[method]()
    model = method.prepare(qwen_moe(num_hidden_layers=1), LoraConfig(r=4, target_modules=SHARED[:1]))
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(2, 1, 32).expand(2, 6, 32).flatten(0, 1)
    model.train()(torch.randint(3, 97, (2, 6)))
    found = (layer(x) - layer.base_layer(x)).unflatten(0, (2, 6)).detach()
    torch.testing.assert_close(found, found[:, :1].expand_as(found), rtol=1e-3, atol=1e-4)
    same = x[:6].repeat(2, 1)
    found = (layer(same) - layer.base_layer(same)).unflatten(0, (2, 6)).detach()
    assert (found[0] - found[1]).abs().max() > 1e-3


class Routed(nn.Module):
    """A block whose experts are linear layers; the second gets no token."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(97, 32)
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(32, 32)}) for _ in range(2))

    def forward(self, input_ids):
        flat = self.embed(input_ids).flatten(0, 1)
        chosen = torch.arange(len(flat)) % 3 > 0
        out = torch.zeros_like(flat)
        out[chosen] = self.experts[0]["up"](flat[chosen])
        return out + self.experts[1]["up"](flat[:0]).sum()


@pytest.mark.parametrize("estimator", ["independent", "flipout", "shared", "local"])
def test_an_expert_sees_one_draw_or_nothing(estimator):
    model = get_peft_model(Routed(), LoraConfig(r=4, target_modules=["up"], init_lora_weights=False))
    posterior = bayesianize(model, BlobConfig(init_std=0.3, estimator=estimator))
    first, second = posterior.named_layers().values()
    noise, x = noise_of(first, posterior, model, input_ids=torch.randint(3, 97, (4, 30)))
    assert x.shape[0] == 80
    assert same_weights(noise, x) == (estimator != "local")
    model(input_ids=torch.randint(3, 97, (4, 30))).sum().backward()
    gradients = [layer.blob_std_parameter_A["default"].grad for layer in (first, second)]
    assert gradients[0].abs().sum() > 0
    assert gradients[1] is None or gradients[1].abs().sum() == 0
    with torch.no_grad(), posterior.stacked([posterior.sample(torch.Generator())], 4):
        model.eval()(input_ids=torch.randint(3, 97, (4, 30)))


@pytest.mark.parametrize("estimator", ["independent", "flipout"])
def test_texts_that_are_packed_have_draws_of_their_own(estimator):
    """Two texts in a row of 96, told apart by their position ids; a row of one text and padding has one."""
    model = with_lora(tiny_llama(), ["q_proj"])
    posterior = bayesianize(model, BlobConfig(init_std=0.3, estimator=estimator))
    layer = next(iter(posterior.named_layers().values()))
    ids = torch.randint(3, 97, (2, 96))
    positions = torch.cat([torch.arange(40), torch.arange(56)]), torch.cat([torch.zeros(9), torch.arange(87)])
    noise, x = noise_of(layer, posterior, model, input_ids=ids, position_ids=torch.stack(positions).long())
    bounds = [0, 40, 96, 192]
    for start, end in pairwise(bounds):
        assert same_weights(noise[start:end], x[start:end])
    assert not same_weights(noise[:96], x[:96])
    assert not same_weights(noise[40:], x[40:])
    own = copy.deepcopy(model)  # follows its own batches
    own.train()(input_ids=ids[:1], position_ids=positions[0].long()[None])
    variant = next(m for m in own.modules() if hasattr(m, "lora_variant")).lora_variant["default"]
    assert (variant.batch.lengths, layer.lora_variant["default"].batch.lengths) == ([40, 56], [40, 56, 96])


def test_fused_experts_are_refused_or_named():
    """PEFT finds names of the shared expert alone; of Mixtral's it makes parameters."""
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.down_proj: 4 experts in one parameter have no"):
        bayesianize(get_peft_model(qwen_moe(), LoraConfig(target_modules=["q_proj", "down_proj"])))
    with pytest.warns(UserWarning, match=r"experts have none: model\.layers\.0\.mlp\.experts\.gate_up_proj and 3 more"):
        bayesianize(get_peft_model(qwen_moe(), LoraConfig(target_modules="all-linear")))
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
    mixtral = MixtralForCausalLM(MixtralConfig(vocab_size=97, num_key_value_heads=2, num_local_experts=2, **sizes))
    with pytest.raises(ValueError, match=r"experts: LoRA on the parameter 'down_proj'"):
        bayesianize(get_peft_model(mixtral, LoraConfig(target_modules=["q_proj", "w1", "w2", "w3"])))


def test_fused_experts_that_peft_leaves_out_are_named():
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    experts = dict(num_local_experts=2, intermediate_size=16, intermediate_size_mlp=16, interleave_moe_layer_step=1)

    def model(**options):
        base = Llama4ForCausalLM(Llama4TextConfig(vocab_size=97, pad_token_id=0, **sizes, **experts))
        return get_peft_model(base, LoraConfig(target_modules=["q_proj", "down_proj"], **options))

    with pytest.raises(ValueError, match=r"layers\.0\.feed_forward\.experts\.down_proj: 2 experts in one parameter"):
        bayesianize(model())
    posterior = bayesianize(model(exclude_modules=["experts.down_proj"]))
    assert [name.split(".")[-2:] for name in posterior.layer_names()] == [
        ["self_attn", "q_proj"],
        ["shared_expert", "down_proj"],
    ]
