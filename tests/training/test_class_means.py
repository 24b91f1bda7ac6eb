"""A head that isn't trained: against brute force, against scikit-learn, and in trainings."""

import shutil
from dataclasses import replace
from itertools import count

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.nn.functional import cross_entropy, one_hot
from transformers import BertConfig, BertForSequenceClassification, EarlyStoppingCallback, TrainerCallback

from bloblora import BlobTrainer
from bloblora.training import DivergedError, last_checkpoint
from bloblora.training.class_means import (
    Classes,
    ClassMeans,
    LeftOut,
    Read,
    _precision,
    keys_of,
    left_out,
    log_shares_left_out,
)

from ..conftest import with_lora
from .conftest import TASK, arguments, assert_equal, classifier, examples, logs, make_trainer, trainable

OPTIONS = dict(head="class_means", max_steps=8, save_strategy="steps", save_steps=1, kl_scale=0.1)


def states_of(counts, d=6, seed=0, dtype=torch.float64):
    """Of Gaussian classes with one covariance, (n, d), and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    mix, centres = (torch.randn(n, d, generator=generator, dtype=dtype) for n in (d, len(counts)))
    mix = mix / 4 + torch.eye(d, dtype=dtype)
    noise = torch.randn(len(labels), d, generator=generator, dtype=dtype)
    return Read(centres[labels] + noise @ mix + 3, labels, torch.arange(len(labels)))


def without(read, k):
    rows = torch.arange(len(read.labels)) != k
    return Read(read.states[rows], read.labels[rows], read.keys[rows])


def scores_of(classes, states, precision):
    weight, bias = classes.linear(precision)
    return states @ weight.T + bias


def without_correction(classes, states, precision):
    towards = classes.means @ precision
    return states @ towards.T - (towards * classes.means).sum(-1) / 2


def sizes_of(read, precision):
    return torch.einsum("ni,ij,nj->n", read.states, precision, read.states)


def head_of(weights, read, **options):
    """A `ClassMeans` over a linear layer for these states."""
    head = torch.nn.Linear(read.states.shape[1], weights, **options).to(read.states.dtype)
    return ClassMeans(head)


def test_the_training_compares_a_record_with_the_means_of_the_others():
    read, ones = states_of([4, 2, 1]), torch.ones(3, dtype=torch.float64)
    precision = torch.eye(6, dtype=torch.float64)
    classes, no_rows = Classes.of(read, ones), torch.empty(0, dtype=torch.long)
    scores = left_out(classes, precision, sizes_of(read, precision), no_rows, read.states[no_rows])
    log_shares = log_shares_left_out(classes)
    for k in range(6):
        others = Classes.of(without(read, k), ones)
        torch.testing.assert_close(scores[k], without_correction(others, read.states[k], precision))
        if k < 4:  # of class 1 one record is left, which is then also its share
            torch.testing.assert_close(log_shares[k], others.log_shares)
    alone = read.states[:6].mean(0)  # of a class with one record nothing is left: the mean of all others
    torch.testing.assert_close(scores[6, 2], read.states[6] @ alone - alone @ alone / 2)


@pytest.mark.parametrize("shrinkage", [0.2, 0.7])
def test_the_discriminant_is_that_of_scikit_learn(shrinkage):
    read = states_of([30, 30, 30], seed=1)
    classes = Classes.of(read, torch.ones(3, dtype=torch.float64))
    weight, bias = classes.linear(classes.precision(shrinkage))
    known = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
    known.fit(read.states.numpy(), read.labels.numpy())
    factor = 87 / 90  # it divides by the number of records
    torch.testing.assert_close(weight, factor * torch.from_numpy(known.coef_))
    expected = factor * (torch.from_numpy(known.intercept_) - classes.log_shares)
    torch.testing.assert_close(bias - bias.mean(), expected - expected.mean())


def test_scores_are_unbiased_however_many_records_a_class_has():
    """E[z_c(φ)] = φᵀ P μ_c − ½ μ_cᵀ P μ_c over training sets; mᵀPm itself is above μᵀPμ by tr PS / n_c."""
    generator, counts, trials = torch.Generator().manual_seed(0), [2, 3, 12], 4000
    centres = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    mix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    precision, point = mix @ mix.T, torch.randn(6, generator=generator, dtype=torch.float64)
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    found = []
    for _ in range(trials):
        states = centres[labels] + torch.randn(17, 6, generator=generator, dtype=torch.float64)
        classes = Classes.of(Read(states, labels, labels), torch.ones(3, dtype=torch.float64))
        found.append(scores_of(classes, point, precision))
    scores = torch.stack(found)
    truth = centres @ precision @ point - ((centres @ precision) * centres).sum(-1) / 2
    error = scores.std(0) / trials**0.5
    assert ((scores.mean(0) - truth).abs() < 4 * error).all()
    assert precision.trace() / (2 * counts[0]) > 20 * error[0]  # by which it would be too low


def test_the_head_of_gaussian_classes_is_calibrated_and_as_good_as_the_truth():
    """With many records it is Bayes' rule: the NLL of new ones is that of the known densities."""
    read, new = states_of([4000, 2000, 1000]), states_of([4000, 2000, 1000], seed=0)
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(6, 6, generator=generator, dtype=torch.float64) / 4 + torch.eye(6, dtype=torch.float64)
    centres = torch.randn(3, 6, generator=generator, dtype=torch.float64) + 3
    new.states = centres[new.labels] + torch.randn(7000, 6, dtype=torch.float64) @ mix
    means = head_of(3, read)
    found = means.finish(iter([read]), iter([new]))
    truth = torch.distributions.MultivariateNormal(centres, mix.T @ mix)
    exact = truth.log_prob(new.states[:, None]) + (torch.tensor([4.0, 2, 1]) / 7).log()
    gap = cross_entropy(means.head(new.states), new.labels) - cross_entropy(exact, new.labels)
    assert 0 <= gap < 0.003
    assert found["shrinkage"] == 0.01
    assert found["scale"] == pytest.approx(1, abs=0.06)


def test_validation_records_choose_shrinkage_and_scale():
    read, held_out = states_of([4, 4, 4, 4], d=40), states_of([9, 9, 9, 9], d=40)
    known, unknown = head_of(4, read), head_of(4, read)
    found = known.finish(iter([read]), iter([held_out]))
    assert found["nll"] == pytest.approx(cross_entropy(known.head(held_out.states), held_out.labels).item(), rel=1e-6)
    held_out.labels = held_out.labels.roll(3)
    assert unknown.finish(iter([read]), iter([held_out]))["scale"] < found["scale"]


def test_a_validation_record_that_joins_is_left_out_of_means_and_covariance():
    read, ones, shrinkage = states_of([5, 4, 3, 1], seed=3), torch.ones(4, dtype=torch.float64), 0.3
    read = Read(
        *(values[torch.randperm(13, generator=torch.Generator().manual_seed(0))] for values in vars(read).values())
    )
    classes = Classes.of(read, ones)
    level = classes._covariance.diagonal().mean()
    scores = classes.left_out(6, shrinkage)
    seen = set()
    for row, k in enumerate(range(7, 13)):
        others, label = Classes.of(without(read, k), ones), read.labels[k]
        if classes.counts[label] > 1:
            precision = torch.linalg.inv((1 - shrinkage) * others._covariance + shrinkage * level * torch.eye(6))
            torch.testing.assert_close(scores[row], scores_of(others, read.states[k], precision))
        else:
            assert scores[row].isfinite().all()
        seen.add(int(classes.counts[label]))
    assert len(seen) > 1


def test_validation_records_join_their_classes():
    """More records a class make a better head; its scale is that of records that weren't there."""
    training, held_out, new = (states_of([n] * 5, d=20, seed=4) for n in (4, 4, 200))
    nlls = []
    for part, read in enumerate((training, held_out, new)):  # of the same classes
        noise = torch.randn(read.states.shape, generator=torch.Generator().manual_seed(part), dtype=torch.float64)
        read.states = training.states[::4][read.labels] * 0.4 + noise
    means = head_of(5, training)
    first = means.finish(iter([training]), iter([held_out]))
    nlls.append(cross_entropy(means.head(new.states), new.labels).item())
    joined = means.join()
    nlls.append(cross_entropy(means.head(new.states), new.labels).item())
    assert {*first} == {*joined} == {"shrinkage", "scale", "nll"}
    assert nlls[1] < nlls[0] - 0.05
    assert joined["nll"] == pytest.approx(nlls[1], abs=0.5)
    means.finish(iter([training]), iter([]))
    assert means.join() == {}


def test_in_a_script_the_evaluation_records_join_when_they_are_told_to(tmp_path):
    trainer = trained(tmp_path, eval_dataset=examples(48)[24:])
    before, head = trainer.class_means_found, trainer.class_means.head.weight.clone()
    of_draws, of_mean = trainer.posterior.temperatures
    states = trainer.class_means._training.states
    assert trainer.join_eval_dataset() == trainer.class_means_found != before
    assert not torch.equal(trainer.class_means.head.weight, head)
    assert trainer.posterior.temperatures == (of_draws / of_mean, 1.0)
    assert len(trainer.class_means._training.states) == len(states)  # a second time it is the same
    again, temperatures = trainer.class_means.head.weight.clone(), trainer.posterior.temperatures
    trainer.join_eval_dataset()
    assert trainer.posterior.temperatures == temperatures
    assert torch.equal(trainer.class_means.head.weight, again)


def test_nothing_joins_a_head_that_is_trained_or_without_evaluation_records(tmp_path):
    assert trained(tmp_path / "trained", head="trained").join_eval_dataset() == {}
    trainer = trained(tmp_path / "alone")
    head = trainer.class_means.head.weight.clone()
    assert trainer.join_eval_dataset() == {}
    assert torch.equal(trainer.class_means.head.weight, head)


def test_a_head_without_a_bias_has_it_in_the_direction_that_all_states_have_in_common():
    read = states_of([10, 10])
    read.states[:, 5] = 10 + torch.randn(20, generator=torch.Generator().manual_seed(0)) / 100
    with_bias, without_bias = head_of(2, read), head_of(2, read, bias=False)
    for means in (with_bias, without_bias):
        means.finish(iter([read]), iter(()))
    logits = [means.head(read.states) for means in (with_bias, without_bias)]
    torch.testing.assert_close(logits[1].softmax(-1), logits[0].softmax(-1), atol=0.01, rtol=0)


def test_copies_of_a_record_count_once():
    read = states_of([3, 3])
    twice = Read(*(torch.cat([tensor, tensor[:1]]) for tensor in vars(read).values()))
    heads = [head_of(2, read) for _ in range(2)]
    for means, one in zip(heads, (read, twice), strict=True):
        means.head.load_state_dict(heads[0].head.state_dict())
        means.finish(iter([one]), iter(()))
    assert torch.equal(heads[0].head.weight, heads[1].head.weight)


def test_a_record_is_known_by_its_tokens_and_label_however_it_is_padded():
    batch = {"input_ids": torch.tensor([[5, 6, 0], [5, 6, 7], [0, 5, 6]])}
    batch["attention_mask"] = (batch["input_ids"] > 0).long()
    keys = keys_of(batch, torch.tensor([1, 1, 1]))
    assert keys[0] == keys[2] != keys[1]
    assert keys_of(batch, torch.tensor([2, 1, 1]))[0] != keys[0]
    assert keys_of({"input_ids": torch.tensor([[5, 6]])}, torch.tensor([1]))[0] == keys[0]


def nll_left_out(states, labels, precision, scale):
    """The mean NLL of states (n, d), record by record; n_c > 1."""
    nlls = []
    for k in range(len(labels)):
        others = torch.arange(len(labels)) != k
        members = one_hot(labels[others], 3).to(states.dtype)
        means = members.T @ states[others] / members.sum(0)[:, None]
        scores = states[k] @ precision @ means.T - ((means @ precision) * means).sum(-1) / 2
        nlls.append(cross_entropy(scale * scores + (members.sum(0) / (len(labels) - 1)).log(), labels[k]))
    return torch.stack(nlls).mean()


def trained(folder, data=24, bayesian=True, model=None, **options):
    model = classifier(bayesian) if model is None else model
    trainer = make_trainer(folder, model, data, **{**OPTIONS, **options})
    trainer.train()
    return trainer


@pytest.mark.parametrize("bayesian", [True, False])
def test_the_loss_is_that_of_means_without_the_record(tmp_path, bayesian):
    """Seen from outside: with nothing trained, the NLL of a step is that of the start's states, each left out."""
    model = classifier(bayesian, init_std=1e-6)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make_trainer(
        tmp_path, model, 24, **OPTIONS, learning_rate=0.0, std_learning_rate=1e-9, per_device_train_batch_size=24
    )
    read = []
    hook = trainer.class_means.head.register_forward_pre_hook(lambda _, args: read.append(args[0][0, -1].detach()))
    model.eval()
    for example in (data := examples(24)):
        model(input_ids=torch.tensor([example["input_ids"]]))
    hook.remove()
    states, labels = torch.stack(read), torch.tensor([example["label"] for example in data])
    precision = _precision(states - states.mean(0), 23, 0.5)
    expected = nll_left_out(states, labels, precision, 17 / 32).item()
    trainer.train()
    assert logs(trainer, "nll")[0] == pytest.approx(expected, rel=1e-3)
    moved = [
        name for name, tensor in model.state_dict().items() if "score" in name and not torch.equal(tensor, start[name])
    ]
    assert moved == ["base_model.model.score.modules_to_save.default.weight"]
    assert trainer.class_means.head.weight.requires_grad


@pytest.mark.parametrize("batch", [24, 6])
def test_the_gradient_is_that_of_the_mean_nll_of_all_records(tmp_path, batch):
    """Of the objective, which the means depend on too; over the batches of a pass it is the mean gradient."""
    model, data = classifier(bayesian=False), examples(24)
    trainer = make_trainer(tmp_path, model, data, **OPTIONS)
    trainer.begin_class_means()
    trainer.is_in_train, trainer.state.global_step = True, 0
    model.train()
    for start in range(0, 24, batch):
        trainer.compute_loss(model, TASK.collate(data[start : start + batch])).backward()
    weights = [p for p in model.parameters() if p.requires_grad]
    found = [p.grad * batch / 24 for p in weights]
    read = []
    for example in data:
        model.zero_grad()
        with trainer.class_means.reading():
            hook = trainer.class_means.head.register_forward_pre_hook(lambda _, args: read.append(args[0][0, -1]))
            model(input_ids=torch.tensor([example["input_ids"]]))
            hook.remove()
    states, labels = torch.stack(read), torch.tensor([example["label"] for example in data])
    precision = _precision((states - states.mean(0)).detach(), 23, 0.5)
    expected = torch.autograd.grad(nll_left_out(states, labels, precision, 17 / 32), weights)
    for own, right in zip(found, expected, strict=True):
        torch.testing.assert_close(own, right, rtol=1e-3, atol=1e-5)


def test_squares_are_those_of_the_gauss_newton_matrix():
    """Of the weighted NLL of all records by the state of one: the trace by the Jacobian of all logits."""
    read, weights = states_of([4, 3, 3]), torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    precision = _precision(read.states - read.states.mean(0), 9, 0.5)

    def logits_of(states):
        now = replace(read, states=read.states.index_put((rows,), states))
        parts = [Classes.of(without(now, k), weights) for k in range(10)]
        scores = [without_correction(part, now.states[k], precision) for k, part in enumerate(parts)]
        return 0.2 * torch.stack(scores) + log_shares_left_out(Classes.of(read, weights))

    rows = torch.tensor([1, 5])
    states = read.states[rows].requires_grad_()
    classes = Classes.of(read, weights)
    scores = left_out(classes, precision, sizes_of(read, precision), rows, states)
    found = LeftOut(0.2 * scores + log_shares_left_out(classes), read.labels, rows, states)
    torch.testing.assert_close(found.logits, logits_of(states))
    of_records = weights[read.labels]
    slopes = found.slopes((of_records * cross_entropy(found.logits, read.labels, reduction="none")).sum())
    torch.manual_seed(0)
    draws = torch.stack([found.expected_square(slopes, of_records) for _ in range(2000)]) * slopes.square().sum(-1)
    p, jacobian = found.logits.detach().softmax(-1), torch.autograd.functional.jacobian(logits_of, states)
    hessians = of_records[:, None, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None])
    traces = torch.einsum("ncki,nce,neki->k", jacobian, hessians, jacobian)
    error = draws.std(0) / 2000**0.5
    assert ((draws.mean(0) - traces).abs() < 4 * error).all()
    assert (error < 0.05 * traces).all()


@pytest.mark.parametrize("bayesian", [True, False])
def test_without_a_task_the_loss_and_the_head_are_the_same(tmp_path, bayesian):
    found = []
    for task in (TASK, None):
        trainer = BlobTrainer(
            classifier(bayesian),
            arguments(tmp_path / str(bool(task)), **{**OPTIONS, "learning_rate": 0.001}, temperature_scaling=False),
            task=task, train_dataset=examples(24), eval_dataset=examples(40)[24:], data_collator=TASK.collate,
        )  # fmt: skip
        trainer.train()
        found.append((logs(trainer, "nll"), trainer.class_means.head.weight.detach()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("step", [3, 8])
def test_a_resumed_training_is_bit_identical(tmp_path, step):
    trainer = trained(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / "again" / f"checkpoint-{step}")
    again = make_trainer(tmp_path / "again", classifier(seed=8), 24, **OPTIONS)
    torch.manual_seed(123)
    again.train(resume_from_checkpoint=True)
    assert logs(again, "nll") == logs(trainer, "nll")
    assert_equal(trainable(again.model), trainable(trainer.model))


def test_a_checkpoint_without_what_the_head_knows_is_not_whole(tmp_path):
    trained(tmp_path)
    (tmp_path / "checkpoint-8" / "class_means.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"class_means\.safetensors"):
        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-7"


def test_evaluation_while_training_is_by_the_head_of_then_and_the_best_is_kept(tmp_path):
    data = examples(60)
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "greater_is_better": False}
    options["temperature_scaling"] = False
    trainer = make_trainer(
        tmp_path, classifier(), data[:40], [EarlyStoppingCallback(8)], data[40:], **OPTIONS, **options
    )
    trainer.train()
    assert len({*logs(trainer, "eval_loss")}) == 8
    assert trainer.class_means_found["nll"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-4)


def test_an_encoder_has_its_dense_layer_trained_and_its_last_one_made_of_means(tmp_path):
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = BertForSequenceClassification(BertConfig(**sizes, num_labels=3, pad_token_id=0))
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    trainer = trained(tmp_path, model=get_peft_model(model, lora), data=24)
    head = trainer.model.base_model.model.classifier.modules_to_save["default"]
    assert trainer.class_means.head is head
    assert head.bias.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"torch_compile": True}, "torch_compile"),
        ({"head": "means"}, "head must be one of auto, trained, class_means, got 'means'"),
    ],
)
def test_what_is_not_offered_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, **{**OPTIONS, **options})


def test_a_gaussian_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match="head_prior_std"):
        trained(tmp_path, model=classifier(head_prior_std="auto"))


def test_a_model_without_such_a_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match="head must be 'trained' for a LlamaForSequenceClassification"):
        trained(tmp_path, model=with_lora(classifier().unload()))


def test_a_record_without_a_label_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a label is -100"):
        trained(tmp_path, data=[*examples(8), {"input_ids": [5, 6], "label": -100}])


@pytest.mark.skipif(torch.cuda.device_count() != 1, reason="needs one GPU")
@pytest.mark.parametrize("bayesian", [True, False])
def test_on_a_gpu_it_is_the_training_of_the_cpu(tmp_path, bayesian):
    """With next to no noise, which is another one there."""
    options = {"learning_rate": 0.001, "std_learning_rate": 1e-9, "save_strategy": "no"}
    on_cpu, on_gpu = (
        trained(tmp_path / str(cpu), model=classifier(bayesian, init_std=1e-6), use_cpu=cpu, **options)
        for cpu in (True, False)
    )
    assert on_gpu.class_means.head.weight.is_cuda
    torch.testing.assert_close(logs(on_gpu, "nll"), logs(on_cpu, "nll"), rtol=1e-3, atol=1e-4)
    heads = [trainer.class_means.head.weight.detach().cpu() for trainer in (on_gpu, on_cpu)]
    torch.testing.assert_close(*heads, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_training_that_is_stopped_gives_the_head_back(tmp_path, error):
    class Stop(TrainerCallback):
        def on_step_end(self, *_, **__):
            raise error

    trainer = make_trainer(tmp_path, classifier(), 24, [Stop()], **OPTIONS)
    with pytest.raises(error):
        trainer.train()
    assert trainer.class_means.head.weight.requires_grad


def test_an_input_that_changes_is_refused(tmp_path):
    numbers = count(3)

    class Changing(list):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            return {**example, "input_ids": [*example["input_ids"], next(numbers)]}

    with pytest.raises(ValueError, match="same inputs in each pass"):
        trained(tmp_path, data=Changing(examples(24)))


@pytest.mark.parametrize("rate", [1e4, 1e30])
def test_a_training_that_diverges_says_so(tmp_path, rate):
    with pytest.raises(DivergedError, match="not finite at step"):
        trained(tmp_path, learning_rate=rate, max_grad_norm=0.0, save_strategy="no")
