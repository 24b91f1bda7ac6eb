"""Training under class means against the optimum of its objective: states that are linear in A, B fixed.

The state of record k is W x_k + B h_k with h_k ~ N(M x_k, Ω² x_k²), and each record has a draw of its own. Over many
fixed draws the bound is a function of M and Ω, whose optimum L-BFGS finds; there is no memory, no batch and no LoRA.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.optimize import minimize
from torch import nn
from torch.nn.functional import one_hot
from transformers import PretrainedConfig

from bloblora import BlobConfig, BlobTrainer, bayesianize
from bloblora.tasks import Classification
from bloblora.training import BlobTrainingArguments

CLASSES, RECORDS, FEATURES, STATE, RANK, PRIOR_STD, KL_SCALE = 3, 60, 8, 4, 2, 0.2, 0.5
SIZES = torch.logspace(0, -1, FEATURES)
LABELS = torch.arange(RECORDS) % CLASSES
TASK = Classification(labels=("a", "b", "c"), pad_token_id=0)


class Linear(nn.Module):
    """Its input is the number of a record, its state W x plus what LoRA adds."""

    def __init__(self, x, weight):
        super().__init__()
        self.config = PretrainedConfig(num_labels=CLASSES, pad_token_id=0)
        self.records = nn.Embedding.from_pretrained(x)
        self.linear = nn.Linear(FEATURES, STATE, bias=False)
        self.linear.weight.data.copy_(weight)
        self.score = nn.Linear(STATE, CLASSES, bias=False)

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.score(self.linear(self.records(input_ids[:, 0]))))


@pytest.fixture(scope="module")
def problem():
    """Inputs x (D, n), W (d, n) and B (d, r)."""
    generator = torch.Generator().manual_seed(0)
    noise, centres = (torch.randn(n, FEATURES, generator=generator) for n in (RECORDS, CLASSES))
    weight = 3 * torch.randn(STATE, FEATURES, generator=generator) / math.sqrt(FEATURES)
    up = torch.linalg.qr(torch.randn(STATE, RANK, generator=generator))[0]
    return (noise + 0.7 * centres[LABELS]) * SIZES, weight, up


def bayesian(x, weight, up):
    torch.manual_seed(0)
    lora = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=["linear"], task_type="SEQ_CLS", modules_to_save=["score"]
    )
    model = get_peft_model(Linear(x, weight), lora)
    posterior = bayesianize(model, BlobConfig(prior_std=PRIOR_STD, head_prior_std="none"))
    model.base_model.model.linear.lora_B["default"].weight.requires_grad_(False).copy_(up)
    return posterior


def mean_and_std(posterior):
    """M and Ω of the one adapted layer, (r, n)."""
    found = [*posterior.named_means().values(), *posterior.named_stds().values()]
    return [tensor.detach().double() for tensor in found]


class Bound:
    """E[mean NLL of all records, each left out] + kl_scale · KL / D, over S draws for each record, nats."""

    def __init__(self, x, weight, up, start, draws=512, seed=0):
        self.x, self.up = x.double(), up.double()
        self.base = self.x @ weight.double().T
        centred = self.base + self.x @ start.T @ self.up.T
        centred = centred - centred.mean(0)
        covariance = centred.T @ centred / (RECORDS - 1)
        target = covariance.diagonal().mean() * torch.eye(STATE)
        self.precision = torch.linalg.inv((covariance + target) / 2)
        half = torch.randn(draws // 2, RECORDS, RANK, generator=torch.Generator().manual_seed(seed)).double()
        self.noise = torch.cat([half, -half])

    def __call__(self, mean, std):
        h = self.x @ mean.T + (self.x.square() @ std.square().T).sqrt() * self.noise
        kl = ((PRIOR_STD / std).log() + (std.square() + mean.square()) / (2 * PRIOR_STD**2) - 0.5).sum()
        return self.nll(self.base + h @ self.up.T) + KL_SCALE * kl / RECORDS

    def nll(self, states):
        """Of states (S, D, d); the means (S, D, C, d) are those that a record is compared with."""
        members = one_hot(LABELS, CLASSES).double()
        others = members.sum(0) - members
        sums = torch.einsum("skd,kc->scd", states, members)[:, None] - members[..., None] * states[:, :, None]
        means = sums / others[..., None]
        towards = means @ self.precision
        scores = (towards * (states[:, :, None] - means / 2)).sum(-1)
        logits = 17 / STATE * scores + (others / (RECORDS - 1)).log()
        return -logits.log_softmax(-1)[:, torch.arange(RECORDS), LABELS].mean()

    def optimum(self, start):
        """M* and Ω*, (r, n)."""

        def value(parameters):
            leaf = torch.tensor(parameters.reshape(2, RANK, FEATURES), requires_grad=True)
            result = self(leaf[0], leaf[1].exp())
            result.backward()
            return result.item(), leaf.grad.numpy().ravel()

        begin = np.r_[start.numpy().ravel(), np.full(start.numel(), math.log(PRIOR_STD / 2))]
        mean, log_std = minimize(value, begin, jac=True, method="L-BFGS-B", options=dict(maxiter=500)).x.reshape(
            2, RANK, FEATURES
        )
        return torch.tensor(mean), torch.tensor(log_std).exp()


@pytest.fixture(scope="module")
def best(problem):
    """M*, Ω*, and the bound over other draws than they were found by."""
    start, _ = mean_and_std(bayesian(*problem))
    return *Bound(*problem, start).optimum(start), Bound(*problem, start, 4096, seed=1)


@pytest.mark.parametrize(
    ("learning_rate", "batch"),
    [
        (4e-3, 30),
        (8e-3, 10),
        pytest.param(4e-3, 10, marks=pytest.mark.long),
        pytest.param(8e-3, 30, marks=pytest.mark.long),
    ],
)
def test_default_training_reaches_the_bounds_optimum(tmp_path, problem, best, batch, learning_rate):
    posterior = bayesian(*problem)
    arguments = BlobTrainingArguments(
        output_dir=str(tmp_path), head="class_means", kl_scale=KL_SCALE, learning_rate=learning_rate, max_steps=1000,
        per_device_train_batch_size=batch, logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
        use_cpu=True,
    )  # fmt: skip
    data = [{"input_ids": [number], "label": label} for number, label in enumerate(LABELS.tolist())]
    trainer = BlobTrainer(posterior.model, arguments, task=TASK, train_dataset=data, data_collator=TASK.collate)
    trainer.train()

    (mean, std), (best_mean, best_std, bound) = mean_and_std(posterior), best
    assert bound(mean, std) <= 1.02 * bound(best_mean, best_std)
    assert (std / best_std).log().square().mean().sqrt() <= 0.1
    assert best_std.max() / best_std.min() > 2  # the data do say different things about different weights
