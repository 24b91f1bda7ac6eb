"""Draws that share forwards, threads and a trunk are the draws that a forward each gives."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    MixtralConfig,
    MixtralForSequenceClassification,
)

from bloblora import BlobConfig, bayesianize, find_posterior, predict
from bloblora.prediction import TopBlocks, WeightDraws
from bloblora.prediction.forward import BatchForward, trunk_below

from ..conftest import OVER_A, tiny_llama, with_lora
from .conftest import TASKS, tiny_classifier

IDS = {
    "input_ids": torch.randint(1, 400, (4, 6), generator=torch.Generator().manual_seed(0)),
    "attention_mask": torch.ones(4, 6, dtype=torch.long),
}


class OneByOne:
    """A posterior's draws, a forward each."""

    def __init__(self, posterior):
        self.draw, self.mean = posterior.draw, posterior.mean


def bayesian(model, targets, layers=None, std=0.4):
    lora = LoraConfig(
        r=4, target_modules=targets, layers_to_transform=layers, task_type="SEQ_CLS", init_lora_weights=False
    )
    model = get_peft_model(model, lora)
    bayesianize(model, BlobConfig(init_std=std, **OVER_A))
    return model.eval()


def one_by_one(model):
    return WeightDraws(OneByOne(find_posterior(model)))


def assert_same_draws(model, inputs, task=None, num_samples=5):
    options = dict(num_samples=num_samples, seed=4, task=task)
    found = predict(model, inputs, **options).draw_probabilities
    expected = predict(model, inputs, sampler=one_by_one(model), **options).draw_probabilities
    assert (expected[0] - expected[1]).abs().max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("name", TASKS)
def test_draws_together_are_the_draws_one_by_one(name, number, case_of, threads):
    threads(number)
    case = case_of(name)
    assert_same_draws(case.model, case.examples, case.task)


@pytest.mark.parametrize("factors", ["B", "AB"])
def test_other_factors(factors):
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS", init_lora_weights=False)
    model = get_peft_model(tiny_classifier(), lora)
    bayesianize(model, BlobConfig(init_std=0.16, factors=factors))
    assert_same_draws(model.eval(), IDS)


def gpt2():
    return GPT2ForSequenceClassification(
        GPT2Config(vocab_size=400, n_embd=32, n_layer=3, n_head=4, n_positions=64, pad_token_id=0, num_labels=3)
    )


def bert():
    sizes = dict(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    return BertForSequenceClassification(BertConfig(**sizes, num_labels=3))


def mixtral():
    sizes = dict(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=3, pad_token_id=0, num_labels=3)
    return MixtralForSequenceClassification(config)


@pytest.mark.parametrize(
    ("make", "targets"), [(gpt2, ["c_attn"]), (bert, ["query", "value"]), (mixtral, ["q_proj", "v_proj"])]
)
@pytest.mark.parametrize("layers", [None, [1]])
def test_other_architectures(make, targets, layers):
    torch.manual_seed(0)
    assert_same_draws(bayesian(make(), targets, layers), IDS)


class Routed(nn.Module):
    """A model whose adapted layer sees some of the tokens, as an expert does."""

    def __init__(self):
        super().__init__()
        self.embed, self.expert, self.head = nn.Embedding(400, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, input_ids, **_):
        hidden = self.embed(input_ids)
        chosen = input_ids % 3 == 0
        hidden = hidden.masked_scatter(chosen.unsqueeze(-1), self.expert(hidden[chosen]))
        return type("Output", (), {"logits": self.head(hidden.mean(1))})


def test_layers_that_see_no_rows_get_their_draws_one_by_one():
    torch.manual_seed(0)
    model = get_peft_model(Routed(), LoraConfig(r=4, target_modules=["expert"], init_lora_weights=False))
    bayesianize(model, BlobConfig(init_std=0.36))
    assert_same_draws(model.eval(), IDS)


def layer_calls(model, run):
    """How often each block of a tiny Llama is computed."""
    blocks = find_posterior(model).model.base_model.model.model.layers
    calls = [0] * len(blocks)

    def count(index):
        def hook(*_):
            calls[index] += 1

        return hook

    hooks = [block.mlp.register_forward_hook(count(i)) for i, block in enumerate(blocks)]
    run()
    for hook in hooks:
        hook.remove()
    return calls


def test_the_trunk_is_computed_once(threads):
    threads(1)
    model = bayesian(tiny_classifier(), ["q_proj"], [1])
    batch = {name: tensor.repeat(50, 2) for name, tensor in IDS.items()}  # so long that draws don't share a forward
    options = dict(num_samples=5, batch_size=200)
    assert layer_calls(model, lambda: predict(model, batch, **options)) == [1, 5]
    assert layer_calls(model, lambda: predict(model, batch, sampler=one_by_one(model), **options)) == [5, 5]
    assert_same_draws(model, batch)


def test_an_error_leaves_the_model_as_it_was():
    model = bayesian(tiny_classifier(), ["q_proj"], [1])
    before = predict(model, IDS, seed=1).log_probs
    with pytest.raises(IndexError):  # a token that the embedding doesn't have
        predict(model, {"input_ids": IDS["input_ids"] + 400})
    assert torch.equal(predict(model, IDS, seed=1).log_probs, before)
    assert all("forward" not in vars(module) for module in model.modules())
    copy.deepcopy(model)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (["model.layers.1.self_attn.q_proj"], 1),
        (["model.layers.1.self_attn.q_proj", "score"], 1),
        (["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"], None),
        (["model.embed_tokens", "model.layers.1.mlp.up_proj"], None),
        (["score"], None),
    ],
)
def test_trunk_below(layers, expected):
    model = tiny_classifier()
    trunk = trunk_below(model, layers)
    assert (trunk and len(trunk.blocks)) == expected
    if trunk:
        assert trunk.above is model.model.layers[1]


@pytest.mark.parametrize(
    ("number", "tokens", "left", "limit", "expected"),
    [
        (1, 16, 10, None, [10]),
        (2, 16, 10, None, [5, 5]),
        (2, 256, 10, None, [2, 2]),
        (2, 600, 10, None, [1, 1]),
        (1, 600, 10, None, [1]),
        (4, 600, 3, None, [1, 1, 1]),
        (2, 16, 10, 3, [2, 1]),
    ],
)
def test_wave(number, tokens, left, limit, expected, threads):
    threads(number)
    forward = BatchForward(nn.Identity(), {"input_ids": torch.ones(2, tokens // 2)}, None)
    forward.limit = limit
    assert forward.wave(left) == expected


def test_autocast_stays_in_its_thread(threads):
    threads(2)
    forward = BatchForward(nn.Identity(), {"input_ids": torch.ones(2, 8)}, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert forward.wave(10) == [10]


def test_draws_in_the_top_blocks_alone(threads):
    """The prediction of a posterior whose Ω is 0 below them, with the lower blocks computed once."""
    threads(1)
    model = bayesian(tiny_classifier(), ["q_proj"])
    posterior = find_posterior(model)
    top = TopBlocks(posterior, 1)
    assert [name.split(".")[4] for name in top.layer_names()] == ["1"]
    options = dict(num_samples=4, seed=4, batch_size=200)
    batch = {name: tensor.repeat(50, 2) for name, tensor in IDS.items()}
    assert layer_calls(model, lambda: predict(model, batch, sampler=WeightDraws(top), **options)) == [1, 4]
    found = predict(model, IDS, sampler=WeightDraws(top), **options).draw_probabilities
    with torch.no_grad():
        for name, parameter in posterior.named_std_parameters().items():
            if ".layers.0." in name:
                parameter.fill_(-torch.inf)
    expected = predict(model, IDS, **options).draw_probabilities
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad(), top.draw(generator):
        torch.testing.assert_close(model(**IDS).logits.softmax(-1), expected[0], rtol=0, atol=1e-6)


def test_top_blocks_says_what_is_wrong():
    model = bayesian(tiny_classifier(), ["q_proj"])
    with pytest.raises(ValueError, match="number must be 1 or more blocks, got 0"):
        TopBlocks(find_posterior(model), 0)
    routed = get_peft_model(Routed(), LoraConfig(r=4, target_modules=["expert"]))
    with pytest.raises(ValueError, match="none of its layers stands in a block"):
        TopBlocks(bayesianize(routed), 1)


@pytest.mark.parametrize("number", [1, 3])
def test_mirrored_draws_are_pairs_about_the_mean(number, threads):
    """A classifier that is one layer is linear in A, so that a pair averages to the mean exactly."""
    threads(number)
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 3)), lora)
    posterior = bayesianize(model, BlobConfig(init_std=0.16))
    x = torch.randn(5, 6)
    sampler = WeightDraws(posterior, mirrored=True)
    first = torch.stack([*WeightDraws(posterior).logits(lambda: model(x), 3, 7)])
    draws = torch.stack([*sampler.logits(lambda: model(x), 5, 7)])
    torch.testing.assert_close(draws[::2], first)
    (mean,) = sampler.logits(lambda: model(x), 0, 7)
    torch.testing.assert_close(draws[:4].unflatten(0, (2, 2)).mean(1), mean.expand(2, -1, -1))
    assert (draws[0] - draws[1]).abs().max() > 0.01


@pytest.mark.parametrize("part", [lambda posterior: posterior, lambda posterior: TopBlocks(posterior, 1)])
def test_mirrored_draws_together_are_those_one_by_one(part, threads):
    threads(1)
    model = bayesian(tiny_classifier(), ["q_proj"])
    sampler = WeightDraws(part(find_posterior(model)), mirrored=True)
    found = predict(model, IDS, 5, 4, sampler=sampler).log_probs
    with torch.no_grad():
        alone = [logits.log_softmax(-1) for logits in sampler.logits(lambda: model(**IDS).logits, 5, 4)]
    torch.testing.assert_close(found, torch.stack(alone), rtol=0, atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_weights_without_a_mean_are_not_mirrored():
    posterior = find_posterior(bayesian(tiny_classifier(), ["q_proj"]))
    with pytest.raises(ValueError, match="mirrored: OneByOne has no `mirror`"):
        WeightDraws(OneByOne(posterior), mirrored=True)


def test_logits_that_are_not_of_classes_are_named(tokens):
    model = with_lora(tiny_llama())
    with pytest.raises(ValueError, match=r"model: without a task its logits must be \(n, C\).*; they are \(4, 7, 97\)"):
        predict(model, {"input_ids": tokens}, 0)
    with pytest.raises(ValueError, match="they are missing"):
        predict(model.get_base_model().model, {"input_ids": tokens}, 0)
