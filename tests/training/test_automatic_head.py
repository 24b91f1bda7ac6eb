"""Which head a training makes where its arguments leave that open."""

from itertools import count

import pytest
import torch
from torch.nn.functional import cross_entropy

from bloblora import BlobConfig, BlobTrainer, bayesianize

from ..conftest import with_lora
from .conftest import TASK, _base, _base_state, arguments, classifier, examples, logs, make_trainer

AUTO = dict(head="auto", kl_scale=0.1)


def fresh(bayesian=True, architectures=None, **config):
    """As a script makes it: a LoRA that changes nothing yet, with a new head."""
    base = _base()
    base.load_state_dict(_base_state())
    base.config.architectures = architectures
    model = with_lora(base, trained=False, modules_to_save=["score"])
    if bayesian:
        torch.manual_seed(7)
        bayesianize(model, BlobConfig(**config))
    return model


def test_under_a_gaussian_over_a_a_new_head_is_one_of_class_means(tmp_path):
    nlls = []
    for head in ("auto", "class_means"):
        trainer = make_trainer(tmp_path, fresh(architectures=["LlamaForCausalLM"]), 24, **{**AUTO, "head": head})
        trainer.train()
        assert trainer.class_means is not None
        assert trainer.automatic()["head"] == "class_means"
        nlls.append(logs(trainer, "nll"))
    assert nlls[0] == nlls[1]
    assert arguments(tmp_path).head == "auto"


@pytest.mark.parametrize(
    ("made", "options"),
    [
        (lambda: fresh(bayesian=False), {}),
        (lambda: fresh(head_prior_std="auto"), {"temperature_scaling": False}),
        (lambda: fresh(architectures=["LlamaForSequenceClassification"]), {}),
        (classifier, {}),  # whose LoRA is trained
        (fresh, {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 1}),
        (fresh, {"head": "trained"}),
    ],
    ids=["plain LoRA", "Gaussian head", "base with a head", "trained LoRA", "compiled", "as asked"],
)
def test_other_heads_are_trained(made, options, tmp_path):
    trainer = make_trainer(tmp_path, made(), 24, **{**AUTO, **options})
    trainer.train()
    assert trainer.class_means is None
    assert "class_means" not in (trainer.automatic() if trainer.posterior else {}).values()


class Changing(list):
    numbers = count(3)

    def __getitem__(self, index):
        example = super().__getitem__(index)
        return {**example, "input_ids": [*example["input_ids"], next(self.numbers) % 90]}


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(examples(24))


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ([{**example, "label": i} for i, example in enumerate(examples(3))], {}),
        ([examples(1)[0]] * 8, {}),
        ([*examples(8), {"input_ids": [5, 6], "label": -100}], {"per_device_train_batch_size": 9}),
        (Changing(examples(24)), {}),
        (Stream(), {"dataset_size": 24}),
    ],
    ids=["alone", "copies", "without a label", "changing", "stream"],
)
def test_so_it_is_on_records_that_have_no_class_means(data, options, tmp_path):
    trainer = BlobTrainer(
        fresh(), arguments(tmp_path, **AUTO, **options), train_dataset=data, data_collator=TASK.collate
    )
    trainer.train()
    assert trainer.class_means is None


def test_so_it_is_with_a_loss_of_its_own(tmp_path):
    class Weighted(BlobTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            loss = cross_entropy(outputs.logits, inputs["labels"], torch.tensor([1.0, 2.0, 3.0]))
            return (loss, outputs) if return_outputs else loss

    def own(outputs, labels, num_items_in_batch=None):
        return cross_entropy(outputs["logits"], labels)

    for kind, options in ((Weighted, {}), (BlobTrainer, {"compute_loss_func": own})):
        trainer = kind(
            fresh(), arguments(tmp_path, **AUTO), train_dataset=examples(24), data_collator=TASK.collate, **options
        )
        trainer.train()
        assert trainer.class_means is None


def test_a_checkpoint_keeps_its_head(tmp_path):
    options = {**AUTO, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    for head, made in (("trained", False), ("auto", True)):
        folder = tmp_path / head
        whole = make_trainer(folder, fresh(), 24, **{**options, "head": head})
        whole.train()
        again = make_trainer(folder, fresh(), 24, **options)
        again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        assert (again.class_means is not None) == made
        assert logs(again, "nll") == logs(whole, "nll")


def test_a_second_training_goes_on_with_the_same_head(tmp_path):
    trainer = make_trainer(tmp_path, fresh(), 24, **AUTO)
    heads = []
    for _ in range(2):
        trainer.train()
        heads.append(trainer.class_means.head.weight.detach().clone())
    assert not torch.equal(*heads)
    other = make_trainer(tmp_path, trainer.model, 24, **AUTO)
    other.train()
    assert other.class_means is None


def test_each_model_of_a_model_init_has_its_own(tmp_path):
    options = dict(train_dataset=examples(24), data_collator=TASK.collate)
    trainer = BlobTrainer(args=arguments(tmp_path, **AUTO), model_init=lambda: fresh(), **options)
    for _ in range(2):
        trainer.train()
        head = trainer.model.base_model.model.score.modules_to_save["default"]
        assert trainer.class_means.head is head
        assert head.weight.requires_grad
