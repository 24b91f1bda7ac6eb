"""SWAG: moments against numpy's, draws against their covariance, and which iterates a training collects."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from bloblora.adapter import AdapterFileError, BlobConfig, bayesianize
from bloblora.files import write_tensors
from bloblora.methods.swag import Iterates, LowRank, Swag
from tests.methods.test_known_answers import LORA, Net, Rows, training

pytestmark = pytest.mark.usefixtures("one_thread")


def prepared(**options):
    torch.manual_seed(1)
    method = Swag(**options)
    return method, method.prepare(Net(), LORA)


def factors(model):
    return [p for name, p in model.named_parameters() if ".lora_" in name]


def test_moments_are_numpys():
    _, model = prepared()
    sequence = torch.randn(7, 27, generator=torch.Generator().manual_seed(0)) + 3
    iterates = Iterates(model)
    for vector in sequence:
        nn.utils.vector_to_parameters(vector, factors(model))
        iterates.collect(rank=4)
    values = sequence.double().numpy()
    running = np.cumsum(values, 0) / np.arange(1, 8)[:, None]
    names = [name for name, _ in model.named_parameters() if ".lora_" in name]

    def flat(of):
        return torch.cat([of(name).flatten(-2) for name in names], -1).numpy()

    np.testing.assert_allclose(flat(iterates.means.__getitem__), values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(flat(iterates.variance), values.var(0), rtol=1e-5)
    columns = flat(lambda name: iterates.columns(name, 4))
    np.testing.assert_allclose(columns, (values - running)[-4:], rtol=1e-4, atol=1e-6)


def test_going_on_from_a_file_gives_the_same_bits(tmp_path):
    _, model = prepared()
    iterates, resumed = Iterates(model), Iterates(model)
    for step in range(6):
        with torch.no_grad():
            for parameter in factors(model):
                parameter.normal_(generator=torch.Generator().manual_seed(step))
        iterates.collect(rank=3)
        if step == 3:
            iterates.save(tmp_path / "a.safetensors")
            resumed.load(tmp_path / "a.safetensors")
        elif step > 3:
            resumed.collect(rank=3)
    for name in iterates.means:
        assert torch.equal(resumed.means[name], iterates.means[name])
        assert torch.equal(resumed.variance(name), iterates.variance(name))
        assert torch.equal(resumed.columns(name, 3), iterates.columns(name, 3))
    write_tensors(tmp_path / "other.safetensors", {"count": torch.tensor(1)})
    with pytest.raises(AdapterFileError, match="it has no mean of base_model"):
        resumed.load(tmp_path / "other.safetensors")


def test_draws_have_the_stated_covariance():
    _, model = prepared()
    posterior = bayesianize(model, BlobConfig(factors="AB"))
    generator = torch.Generator().manual_seed(0)
    columns = {n: torch.randn(3, *m.shape, generator=generator) for n, m in posterior.named_means().items()}
    for parameter in posterior.named_std_parameters().values():
        nn.init.uniform_(parameter, math.log(0.09), math.log(1.44))

    def flat(of_factor):
        return torch.cat([of_factor[name].detach().flatten(-2) for name in columns], -1).double()

    directions, variances = flat(columns), flat(posterior.named_stds()).square()
    expected = torch.diag(variances) + directions.T @ directions
    low_rank, count = LowRank(posterior, columns), 20_000
    draws = []
    for _ in range(count):
        drawn = low_rank.sample(generator)
        draws.append(flat({f"{layer}.lora_{f}": w for layer, of in drawn.items() for f, w in of.items()}))
    draws = torch.stack(draws)
    scale = expected.diag()
    error = (scale.outer(scale) + expected.square()).div(count).sqrt()  # of a normal sample's covariance
    assert ((draws.T.cov() - expected) / error).abs().max() < 5
    assert ((draws.mean(0) - flat(posterior.named_means())) / (scale / count).sqrt()).abs().max() < 5


class Recorded(TrainerCallback):
    def __init__(self):
        self.weights, self.rates = [], []

    def on_step_begin(self, args, state, control, optimizer=None, **_):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args, state, control, model=None, **_):
        self.weights.append(nn.utils.parameters_to_vector(factors(model)).detach().double().numpy())


@pytest.mark.parametrize("rank", [3, 0])
def test_a_training_is_averaged_where_it_says(rank, tmp_path):
    method, model = prepared(burn_in=0.6, num_iterates=4, covariance_rank=rank, covariance_scale=0.7)
    setup, seen = training(Rows(), tmp_path, max_steps=20, warmup_steps=2), Recorded()
    setup.callbacks = [seen]
    sampler = method.fit(model, setup)
    # of the last 8 steps every second one
    iterates = np.stack([seen.weights[step - 1] for step in (14, 16, 18, 20)])
    found = torch.cat([mean.detach().flatten() for mean in sampler.weights.posterior.named_means().values()]).numpy()
    np.testing.assert_allclose(found, iterates.mean(0), rtol=1e-5, atol=1e-7)
    stds = torch.cat([std.detach().flatten() for std in sampler.weights.posterior.named_stds().values()]).numpy()
    np.testing.assert_allclose(stds**2, 0.7 * iterates.var(0), rtol=1e-3, atol=1e-12)
    deviations = iterates - np.cumsum(iterates, 0) / np.arange(1, 5)[:, None]
    assert len(sampler.weights.columns) == (2 if rank else 0)
    if rank:
        columns = torch.cat([of.flatten(1) for of in sampler.weights.columns.values()], 1).numpy()
        np.testing.assert_allclose(columns, math.sqrt(0.7 / 2) * deviations[1:], rtol=1e-3, atol=1e-7)
    # 2 steps of warm-up, 10 down to a tenth, 8 that stay
    falling = [1 - 0.9 * step / 10 for step in range(10)]
    np.testing.assert_allclose(seen.rates, 0.05 * np.array([0, 0.5, *falling, *[0.1] * 8]), rtol=1e-6)


def test_cycles_end_at_each_iterate():
    method = Swag(burn_in=0.5, num_iterates=3, collect_rate=0.5, collect_schedule="cyclical")
    assert method.collected(20) == [14, 17, 20]
    assert Swag(burn_in=0.9).collected(3) == [2, 3]
    rates = [method.rate(step, 20, 0) for step in range(10, 20)]
    cycle = [0.5 * (1 - 0.99 * part / 3) for part in (1, 2, 3)]
    assert rates == pytest.approx([0.5, *cycle * 3])


def test_too_few_steps_are_an_error_before_the_first(tmp_path):
    method, model = prepared()
    setup, seen = training(Rows(), tmp_path, num_train_epochs=1, max_steps=-1), Recorded()
    setup.callbacks = [seen]
    with pytest.raises(ValueError, match="max_steps is 1; method 'swag' needs at least 2"):
        method.fit(model, setup)
    assert not seen.weights


def test_a_training_that_is_ended_early_is_one_function(tmp_path):
    class End(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 3

    method, model = prepared()
    setup, seen = training(Rows(), tmp_path, max_steps=20), Recorded()
    setup.callbacks = [seen, End()]
    with pytest.warns(UserWarning, match="ended with 0 iterates"):
        sampler = method.fit(model, setup)
    means = sampler.weights.posterior.named_means()
    drawn = sampler.weights.sample(torch.Generator().manual_seed(0))
    for name, mean in means.items():
        layer, _, factor = name.rpartition(".lora_")
        torch.testing.assert_close(drawn[layer][factor], mean.detach(), rtol=0, atol=1e-12)
    found = torch.cat([mean.detach().flatten() for mean in means.values()]).double().numpy()
    np.testing.assert_array_equal(found, seen.weights[-1])
