"""What TensorBoard reads of a training."""

import pytest
import torch

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bloblora import find_posterior
from bloblora.training import PosteriorHistograms

from .conftest import assert_equal, classifier, make_trainer, trainable


def events(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"histograms": 0, "scalars": 0})
    return accumulator.Reload()


def test_histograms_are_those_of_the_parameters(tmp_path):
    model = classifier()
    make_trainer(tmp_path / "out", model, callbacks=[PosteriorHistograms(tmp_path / "tb")], max_steps=2).train()
    read, posterior = events(tmp_path / "tb"), find_posterior(model)
    names = [f"{layer}.lora_A" for layer in posterior.layer_names()]
    assert len(names) == 4  # q and v of two layers
    kinds = ("mean", "signal_to_noise", "std")
    assert sorted(read.Tags()["histograms"]) == sorted(f"{kind}/{name}" for kind in kinds for name in names)
    means, stds = posterior.named_means(), posterior.named_stds()
    for name in names:
        values = {"std": stds[name], "mean": means[name], "signal_to_noise": means[name].abs() / stds[name]}
        for kind, tensor in values.items():
            first, last = read.Histograms(f"{kind}/{name}")
            assert (first.step, last.step) == (1, 2)
            found = last.histogram_value
            assert found.num == tensor.numel() == 4 * 32
            expected = [f(tensor).item() for f in (torch.min, torch.max, torch.sum)]
            assert [found.min, found.max, found.sum] == pytest.approx(expected, rel=1e-5)


def test_the_parts_of_the_kl_sum_to_the_whole(tmp_path):
    trainer = make_trainer(tmp_path / "out", callbacks=[PosteriorHistograms(tmp_path / "tb")])
    trainer.train()
    read = events(tmp_path / "tb")
    parts = [tag for tag in read.Tags()["scalars"] if tag.startswith("kl/")]
    total = sum(read.Scalars(tag)[-1].value for tag in parts)
    assert len(parts) == 4
    assert total == pytest.approx(trainer.posterior.kl().item(), rel=1e-5)
    assert total == pytest.approx(read.Scalars("train/kl")[-1].value, rel=1e-5)


@pytest.mark.parametrize("prior", ["normal", "laplace"])
def test_looking_changes_nothing(tmp_path, prior):
    trained = []
    for callbacks in ([], [PosteriorHistograms(tmp_path / prior)]):
        model = classifier(prior=prior)
        make_trainer(tmp_path / "out", model, callbacks=callbacks).train()
        trained.append(trainable(model))
    assert_equal(*trained)


def test_every_second_log(tmp_path):
    make_trainer(tmp_path / "out", callbacks=[PosteriorHistograms(tmp_path / "tb", every=2)], max_steps=4).train()
    read = events(tmp_path / "tb")
    (tag, *_) = read.Tags()["histograms"]
    assert [event.step for event in read.Histograms(tag)] == [1, 3]
    assert [event.step for event in read.Scalars("train/nll")] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        PosteriorHistograms(every=0)


def test_a_plain_lora_and_a_second_training(tmp_path):
    callback = PosteriorHistograms(tmp_path / "tb")
    for steps in (2, 3):
        make_trainer(tmp_path / "out", classifier(bayesian=False), callbacks=[callback], max_steps=steps).train()
    for folder, steps in ((tmp_path / "tb", 2), (tmp_path / "tb" / "2", 3)):
        read = events(folder)
        assert len(read.Scalars("train/nll")) == steps
        assert read.Tags()["histograms"] == []
