"""`label_logits` equals the whole head, indexed, for every state a PEFT layer can be in."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from bloblora.adapter import BlobConfig, bayesianize
from bloblora.tasks import label_logits

IDS = torch.tensor([7, 3, 41])


class Net(nn.Module):
    def __init__(self, bias: bool = False):
        super().__init__()
        self.lm_head = nn.Linear(8, 50, bias=bias)

    def forward(self, x):
        return self.lm_head(x)


def lora_net(**options):
    config = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False, **options)
    return get_peft_model(Net(bias=True), config).eval()


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(5, 2, 8)


def assert_same(model, hidden):
    head = model.base_model.model.lm_head
    torch.testing.assert_close(label_logits(head, hidden, IDS), model(hidden)[..., IDS])


@pytest.mark.parametrize("bias", [False, True])
def test_plain_linear(bias, hidden):
    head = nn.Linear(8, 50, bias=bias)
    torch.testing.assert_close(label_logits(head, hidden, IDS), head(hidden)[..., IDS])


@pytest.mark.parametrize(
    "options",
    [{}, {"lora_bias": True}, {"use_rslora": True}, {"use_dora": True}, {"lora_dropout": 0.5}],
    ids=str,
)
def test_lora_adapters(options, hidden):
    assert_same(lora_net(**options), hidden)


def test_adapter_states(hidden):
    model = lora_net()
    head = model.base_model.model.lm_head
    base = head.base_layer(hidden)[..., IDS]
    model.add_adapter("second", LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    assert_same(model, hidden)
    both = label_logits(head, hidden, IDS)
    model.set_adapter("second")
    assert_same(model, hidden)
    assert not torch.allclose(label_logits(head, hidden, IDS), both)
    with model.disable_adapter():
        torch.testing.assert_close(label_logits(head, hidden, IDS), base)
    model.merge_adapter()
    assert_same(model, hidden)
    with model.disable_adapter():
        torch.testing.assert_close(label_logits(head, hidden, IDS), base, atol=1e-5, rtol=1e-5)


def test_bayesian_adapter_uses_the_current_draw(hidden):
    model = lora_net()
    posterior = bayesianize(model, BlobConfig())
    assert_same(model, hidden)
    mean = label_logits(model.base_model.model.lm_head, hidden, IDS)
    with posterior.draw(seed=0):
        assert_same(model, hidden)
        assert not torch.allclose(label_logits(model.base_model.model.lm_head, hidden, IDS), mean)


def test_modules_to_save_and_offloaded_heads(hidden):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class AddOne(ModelHook):
        def post_forward(self, module, output):
            return output + 1

    head = nn.Linear(8, 50)
    expected = head(hidden)[..., IDS] + 1
    add_hook_to_module(head, AddOne())
    torch.testing.assert_close(label_logits(head, hidden, IDS), expected)
    torch.testing.assert_close(label_logits(nn.Sequential(head), hidden, IDS), expected)


def test_gradient_reaches_adapter(hidden):
    model = lora_net()
    head = model.base_model.model.lm_head
    label_logits(head, hidden, IDS).sum().backward()
    few = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model(hidden)[..., IDS].sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(few[name], parameter.grad)
