"""What the benchmark compares is one computation: without noise, on average over it, and step by step."""

import json
import math

import pytest
import torch

from benchmarks import training_step as benchmark

TARGETS = ["q_proj", "v_proj"]


def trained(name):
    """A trainer whose B isn't 0, and the benchmark's batch."""
    base = benchmark.load(None)
    trainer = benchmark.trainer_of(name, base, TARGETS)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in trainer.model.named_parameters():
            if "lora_B" in key:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return trainer, benchmark.batch_of(base, 4, 8)


def loss_and_gradients(trainer, batch):
    trainer.model.train().zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    named = trainer.model.named_parameters()
    return loss.detach(), {name: p.grad.clone() for name, p in named if ".lora_" in name}


def fill_std(trainer, value):
    square = trainer.posterior.config.std_parameterization == "square"
    with torch.no_grad():
        for parameter in trainer.posterior.named_std_parameters().values():
            parameter.fill_(value**0.5 if square else torch.tensor(value).log())


@pytest.mark.parametrize("name", benchmark.BLOB)
def test_without_noise_loss_and_gradients_are_plain_loras(name):
    trainer, batch = trained(name)
    fill_std(trainer, 0.0)
    torch.testing.assert_close(loss_and_gradients(trainer, batch), loss_and_gradients(*trained(benchmark.PLAIN)))


def test_estimators_have_one_mean_gradient():
    """But for `local`, which gives each token an A of its own: that is another expectation."""
    count, means, variances = 150, {}, {}
    for name in ("reparameterization", "flipout", "shared"):
        trainer, batch = trained(name)
        fill_std(trainer, 0.3)
        draws = [loss_and_gradients(trainer, batch)[1] for _ in range(count)]
        flat = torch.stack([torch.cat([g.flatten() for g in draw.values()]) for draw in draws]).double()
        means[name], variances[name] = flat.mean(0), flat.var(0) / count
    plain = torch.cat([g.flatten() for g in loss_and_gradients(*trained(benchmark.PLAIN))[1].values()])
    first, *others = means
    for name in others:
        z = (means[name] - means[first]) / (variances[name] + variances[first]).sqrt()
        assert z.abs().max() < 6  # of a thousand entries
        assert z.square().mean() == pytest.approx(1, abs=0.3)
    noise = ((means[first] - plain) / variances[first].sqrt()).abs().max()
    assert noise > 6  # so much that a wrong mean would show


@pytest.mark.parametrize("name", [benchmark.PLAIN, benchmark.MONTECLORA, *benchmark.BLOB])
def test_a_step_trains_the_adapter_and_leaves_the_base(name):
    base = benchmark.load(None)
    before = {key: tensor.clone() for key, tensor in base.state_dict().items() if "score" not in key}
    shared = benchmark.share_weights(base)
    trainer = benchmark.trainer_of(name, shared, TARGETS)
    old = {key: p.detach().clone() for key, p in trainer.model.named_parameters() if p.requires_grad}
    step = benchmark.step_of(trainer, benchmark.batch_of(base, 4, 8))
    assert math.isfinite(step().item())
    assert all((base.state_dict()[key] == tensor).all() for key, tensor in before.items())
    moved = {key for key, p in trainer.model.named_parameters() if key in old and (p != old[key]).any()}
    assert any("lora_B" in key for key in moved)
    assert any("blob_std" in key for key in moved) == (name in benchmark.BLOB)


def test_the_profile_finds_what_blob_adds():
    base, name = benchmark.load(None), "BLoB"
    batch = benchmark.batch_of(base, 4, 8)
    trainers = {n: benchmark.trainer_of(n, benchmark.share_weights(base), TARGETS) for n in (benchmark.PLAIN, name)}
    more = benchmark.account({n: benchmark.step_of(trainer, batch) for n, trainer in trainers.items()}, name, count=1)
    assert "aten::bmm" in more  # the noise's


def test_smoke(tmp_path, capsys):
    variants = ["BLoB", "paper"]
    benchmark.main(["--smoke", "--no-memory", "--results", str(tmp_path), "--variants", *variants])
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert list(results["cells"]) == ["2 × 8, q and v", "2 × 8, all-linear"]
    for cell in results["cells"].values():
        assert set(cell["kl_share"]) == set(variants)
        assert cell["ratio"][benchmark.PLAIN] == [1.0, 1.0]
        more = list(cell["more_seconds"].values())
        assert len(more) == 12
        assert sorted(more, key=abs, reverse=True) == more
    report = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert report in capsys.readouterr().out
    assert "| paper |" in report
