"""Priors with a mean and a width of their own for each entry or layer, inside a model and on disk."""

import copy
import itertools
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributions import Normal, kl_divergence

from bloblora import BlobConfig, bayesianize, find_posterior, load, save
from bloblora.adapter import AdapterFileError, check_folder, debayesianize, load_posterior
from bloblora.runs import RunConfig, RunError
from tests.conftest import tiny_llama, with_lora

CONFIG = BlobConfig(prior_mean="start", prior_std="start")
INPUTS, RANK = 32, 4


def moved(config=CONFIG):
    """A Bayesian model whose means have left their start."""
    model = with_lora(tiny_llama())
    posterior = bayesianize(model, config)
    with torch.no_grad():
        for mean in posterior.named_means().values():
            mean += 0.3 * torch.randn_like(mean)
    return model.eval()


def kl(posterior, prior_means, prior_stds):
    """By torch."""
    means, stds = posterior.named_means(), posterior.named_stds()
    return sum(
        kl_divergence(Normal(means[name], stds[name]), Normal(prior_means[name], prior_stds[name])).sum()
        for name in means
    )


def test_the_start_is_the_mean_of_the_prior():
    model = with_lora(tiny_llama())
    start = {
        name.removesuffix(".default.weight"): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "lora_A" in name
    }
    posterior = bayesianize(model, BlobConfig(prior_mean="start", prior_std=0.3))
    widths = dict.fromkeys(start, torch.tensor(0.3))
    torch.testing.assert_close(posterior.kl(), kl(posterior, start, widths))
    with torch.no_grad():
        for mean in posterior.named_means().values():
            mean.mul_(2)
    torch.testing.assert_close(posterior.kl(), kl(posterior, start, widths))
    torch.testing.assert_close(sum(posterior.named_kls().values()), posterior.kl())


@pytest.mark.parametrize("factors", ["A", "B", "AB"])
def test_start_is_as_wide_as_the_start_of_lora(factors):
    model = with_lora(tiny_llama(), trained=False)
    posterior = bayesianize(model, BlobConfig(prior_std="start", factors=factors))
    priors, zero = posterior.named_priors(), torch.zeros(())
    for name, mean in posterior.named_means().items():
        if name.endswith("A"):
            assert priors[name][1].unique().item() == pytest.approx(mean.detach().std(correction=0).item(), rel=0.02)
            assert priors[name][1][0, 0].item() == pytest.approx(1 / math.sqrt(3 * INPUTS), rel=0.15)
        else:
            torch.testing.assert_close(priors[name][1], torch.full_like(mean, 1 / math.sqrt(3 * RANK)))
        assert posterior.named_stds()[name].max() <= priors[name][1][0, 0] / 40 * (1 + 1e-6)
    widths = {name: std for name, (_, std) in priors.items()}
    torch.testing.assert_close(posterior.kl(), kl(posterior, dict.fromkeys(widths, zero), widths))


def test_start_is_that_of_a_trained_adapter():
    model = with_lora(tiny_llama())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.fill_(0.05)
    posterior = bayesianize(model, BlobConfig(prior_std="start"))
    assert all(std.unique().item() == pytest.approx(0.05) for _, std in posterior.named_priors().values())
    with torch.no_grad():
        for mean in posterior.named_means().values():
            mean.fill_(0.4)
    posterior.restart()
    assert all(std.unique().item() == pytest.approx(0.4) for _, std in posterior.named_priors().values())
    assert posterior.start_std() == pytest.approx(0.01)


def test_a_posterior_becomes_the_prior():
    posterior = find_posterior(moved(BlobConfig(std_parameterization="softplus")))
    posterior.update_prior()
    assert posterior.kl().item() == pytest.approx(0, abs=1e-3)
    assert posterior.summary()["share_at_prior"] == 1
    means, stds = (
        {name: x.detach().clone() for name, x in of.items()} for of in (posterior.named_means(), posterior.named_stds())
    )
    with torch.no_grad():
        for tensor in itertools.chain(*posterior.parameters()):
            tensor += 0.1
    torch.testing.assert_close(posterior.kl(), kl(posterior, means, stds))
    student = find_posterior(moved(BlobConfig(prior="student_t")))
    with pytest.raises(ValueError, match=r"BlobConfig.prior must be 'normal', as the posterior is, got 'student_t'"):
        student.update_prior()


def test_copies_and_what_is_left_without_it():
    model = moved()
    clone = copy.deepcopy(model)
    assert torch.equal(find_posterior(clone).kl(), find_posterior(model).kl())
    debayesianize(clone)
    assert not [name for name, _ in clone.named_buffers() if "blob" in name]
    assert bayesianize(clone).named_priors() == {}
    assert not [name for name in model.state_dict() if "prior" in name]
    model.delete_adapter("default")
    assert not [name for name, _ in model.named_buffers() if "blob" in name]


@pytest.mark.parametrize("saved_by", [save, lambda model, folder: model.save_pretrained(folder)], ids=["save", "peft"])
@pytest.mark.parametrize("updated", [False, True])
def test_it_comes_back_from_disk(tmp_path, saved_by, updated):
    model = moved()
    posterior = find_posterior(model)
    if updated:
        posterior.update_prior()
    saved_by(model, tmp_path)
    assert not [name for name in load_file(tmp_path / "adapter_model.safetensors") if "blob" in name]
    file = load_file(tmp_path / "prior.safetensors")
    assert {tensor.ndim for name, tensor in file.items() if name.endswith("std")} == {2 if updated else 0}
    again = find_posterior(load(tiny_llama(), tmp_path))
    assert again.config == posterior.config
    assert torch.equal(again.kl(), posterior.kl())
    other = moved(BlobConfig())
    load_posterior(other, tmp_path)
    for name, prior in find_posterior(other).named_priors().items():
        assert all(map(torch.equal, prior, posterior.named_priors()[name]))
    saved_by(moved(BlobConfig()), tmp_path)
    assert not (tmp_path / "prior.safetensors").exists()
    assert find_posterior(load(tiny_llama(), tmp_path)).named_priors() == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.unlink(), "prior.safetensors is missing although blob_config.json names it"),
        (lambda file: file.write_bytes(file.read_bytes()[:100]), "not readable as safetensors"),
        (
            lambda file: save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file),
            r"its SHA-256 is .* but blob_config.json \(prior_sha256\) says",
        ),
    ],
    ids=["gone", "cut", "altered"],
)
def test_damage_is_noticed(tmp_path, change, message):
    save(moved(), tmp_path)
    assert check_folder(tmp_path) == tmp_path
    change(tmp_path / "prior.safetensors")
    with pytest.raises(AdapterFileError, match=message):
        load(tiny_llama(), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior_std": "wide"}, r"must be a finite number above 0, got 'wide'; the only words are 'auto' and 'start'"),
        ({"init_std": "auto"}, r"init_std must be a finite number above 0, got 'auto'"),
        ({"prior_mean": "zeros"}, r"prior_mean must be one of auto, zero, start, got 'zeros'"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        BlobConfig(**options)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_holds_a_part_of_the_base_weight(start, tokens, tmp_path):
    """Without data the KL leaves the base model what it is; around zero it would take that part away."""
    expected = tiny_llama()(tokens).logits

    def flowed(**config):
        model = with_lora(tiny_llama(), trained=False, init_lora_weights=start)
        posterior = bayesianize(model, BlobConfig(std_parameterization="square", prior_std=1.0, **config))
        torch.testing.assert_close(model.eval()(tokens).logits, expected, rtol=0, atol=1e-4)
        posterior.flow_(0.2)
        return model, posterior

    model, posterior = flowed()
    assert len(posterior.named_priors()) == len(posterior.named_means())
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-4)
    with posterior.draw(0):
        assert (model(tokens).logits - expected).abs().max() > 1e-3
    zero, _ = flowed(prior_mean="zero")
    assert (zero(tokens).logits - expected).abs().max() > 0.01
    save(model, tmp_path)
    loaded = load(tiny_llama(), tmp_path)
    torch.testing.assert_close(loaded(tokens).logits, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(find_posterior(loaded).kl(), posterior.kl())


def test_starts_that_cannot_be_found_again_are_refused(tmp_path):
    """PEFT draws it again when it loads the adapter, without a seed: the answers would be others."""
    model = with_lora(tiny_llama(), trained=False, init_lora_weights="pissa_niter_2")
    for refused in (lambda: bayesianize(model), lambda: save(model, tmp_path)):
        with pytest.raises(ValueError, match=r"init_lora_weights is 'pissa_niter_2': .* give pissa"):
            refused()
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json: init_lora_weights is 'pissa_niter_2'"):
        load(tiny_llama(), tmp_path)
    refused = {"pissa_niter_2": "a random part", "corda": "depends on data.* give pissa", "lora_ga": "depends on data"}
    for start, why in (refused | {"eva": "initialize_lora_eva_weights, .* as start_from"}).items():
        with pytest.raises(RunError, match=f"init_lora_weights is '{start}'.* {why}"):
            RunConfig.of(data="data.jsonl", output="run", method="lora", init_lora_weights=start)


def test_other_starts_have_a_prior_around_zero():
    for start in (True, False, "gaussian", "orthogonal"):
        posterior = bayesianize(with_lora(tiny_llama(), trained=False, init_lora_weights=start))
        assert posterior.named_priors() == {}


@pytest.mark.parametrize(
    ("options", "std"),
    [
        ({}, 0.1),
        ({"modules_to_save": ["lm_head"]}, 0.4),
        ({"modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM"}, 0.1),
    ],
)
def test_auto_is_wider_under_a_fresh_head(options, std, tmp_path):
    model = with_lora(tiny_llama(), **options)
    posterior = bayesianize(model)
    assert (posterior.config.prior_std, posterior.prior.prior_std) == (std, std)
    assert not posterior.named_priors()
    save(model, tmp_path)
    assert find_posterior(load(tiny_llama(), tmp_path)).config == posterior.config
