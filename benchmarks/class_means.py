r"""Does a LoRA learn more below a head that is integrated out than below one that is trained?

    python benchmarks/class_means.py
    python benchmarks/class_means.py --records 6 12 --seeds 0 1 2

Below a fresh head a LoRA is trained on the support desk in four ways, with the same records, steps and learning rate:

* a point: cross-entropy, as a plain LoRA;
* a Gaussian: the bound of the default (`bloblora.adapter.head`), with its prior and its KL;
* class means: no head is trained. A class is the mean m_c of what its records look like to the head, and a record is
  compared with means that leave itself out,

      z_c(x_k) = s (φ_kᵀ P m_c − ½ m_cᵀ P m_c),   m_c without x_k,

  the discriminant of Gaussian classes with one covariance. P is the inverse of the covariance of all states before
  the first step, shrunk by half towards a multiple of I; s is 0.03. A mean is of its records as they were last seen;
* class means under noise: the same, and A is Gaussian (`bayesianize`: σp 0.4, kl_scale 0.1, the defaults for this A).

Each is then classified by its own head, by the discriminant of all its training records with a shrunk covariance within
the classes (Friedman 1989), and by the geometric mean of both. The discriminant is a linear head without a bias, which
stands in the direction that all states have in common. Checkpoint, shrinkage and temperature have the lowest NLL of the
validation records. Adapters in the last ten blocks, float32, the mean of A (N = 0). What is below the adapters is
computed once. Three to five minutes a training on one core; those that results.json has are not repeated.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import keep, kept, parser_of
from head_posterior import PARTS, scored
from head_posterior import Texts as Read
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModel, get_linear_schedule_with_warmup, set_seed

from bloblora import BlobConfig, bayesianize, models, runs
from bloblora.data import read_records
from bloblora.evaluation import Interval, markdown_table, paired_bootstrap
from bloblora.files import read_tensors, write_tensors
from bloblora.posterior import NormalPrior
from bloblora.studies.job import machine
from bloblora.tasks import CATEGORICAL

SHRINKAGES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
BATCH, LEARNING_RATE, SCALE = 16, 2e-3, 0.03
WAYS = ("a point", "a Gaussian", "class means", "class means under noise")
REFERENCE = WAYS[0]


@dataclass
class Texts:
    """What the first adapted block reads of each text, (T, d), and the classes (n,), -1 for none of them."""

    below: list[Tensor]
    labels: Tensor


class Top(nn.Module):
    """The last blocks of a model, and what its head would read of each text's last token."""

    def __init__(self, model: Any, blocks: int) -> None:
        super().__init__()
        model.layers = model.layers[-blocks:]
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
        self.model = get_peft_model(model, lora)

    def forward(self, below: Sequence[Tensor]) -> Tensor:
        """(b, d) of (T, d) each."""
        lengths = torch.tensor([len(states) for states in below])
        padded = nn.utils.rnn.pad_sequence([*below], batch_first=True)
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        states = self.model(inputs_embeds=padded, attention_mask=mask, use_cache=False).last_hidden_state
        return states[torch.arange(len(below)), lengths - 1]

    @torch.no_grad()
    def read(self, texts: Texts) -> Tensor:
        """The same of all texts (n, d), in eval mode, which is the mean of a posterior."""
        self.eval()
        order = sorted(range(len(texts.below)), key=lambda i: len(texts.below[i]))
        batches = [order[start : start + 32] for start in range(0, len(order), 32)]
        states = torch.cat([self([texts.below[i] for i in batch]) for batch in batches])
        self.train()
        return states[torch.tensor(order).argsort()]


@torch.no_grad()
def texts_of(model: Any, tokenizer: Any, records: Sequence[dict[str, Any]], classes: list[str], blocks: int) -> Texts:
    """Of records."""
    inputs = (torch.tensor([tokenizer(record["text"])["input_ids"]]) for record in records)
    below = [model(ids, output_hidden_states=True).hidden_states[-blocks - 1][0] for ids in inputs]
    labels = [classes.index(record["label"]) if record.get("label") in classes else -1 for record in records]
    return Texts(below, torch.tensor(labels))


def shrunk(deviations: Tensor, freedom: int, shrinkage: float) -> Tensor:
    """The inverse of a covariance (d, d) that is shrunk towards a multiple of I."""
    covariance = deviations.T @ deviations / freedom
    target = covariance.diagonal().mean() * torch.eye(len(covariance))
    return torch.linalg.inv(torch.lerp(covariance, target, shrinkage))


def means_of(states: Tensor, labels: Tensor) -> Tensor:
    """(C, d)."""
    counts = labels.bincount().float()
    return torch.zeros(len(counts), states.shape[1]).index_add_(0, labels, states) / counts[:, None]


def discriminant(states: Tensor, labels: Tensor, shrinkage: float) -> Tensor:
    """The weights (C, d) of the head s (φᵀ P m_c − ½ m_cᵀ P m_c), whose bias is that of a state of the usual size."""
    means = means_of(states, labels)
    towards = means @ shrunk(states - means[labels], max(1, len(labels) - len(means)), shrinkage)
    common = states.mean(0)
    bias = (towards * means).sum(-1, keepdim=True) / 2
    return SCALE * (towards - bias * common / common.square().sum())


class LeaveOneOut:
    """The loss by class means that leave each record out."""

    def __init__(self, states: Tensor, labels: Tensor) -> None:
        self.seen, self.labels = states.clone(), labels
        self.precision = shrunk(states - states.mean(0), len(states) - 1, 0.5)

    def __call__(self, states: Tensor, rows: Tensor) -> Tensor:
        """Of states (b, d) of some records, nats."""
        self.seen[rows] = states.detach()
        own, means, counts = self.labels[rows], means_of(self.seen, self.labels), self.labels.bincount().float()
        others = (counts[own].clamp_min(2) - 1)[:, None]
        without = means[own] + (means[own] - self.seen[rows]) / others
        towards, towards_own = means @ self.precision, without @ self.precision
        logits = states @ towards.T - (towards * means).sum(-1) / 2
        right = (states * towards_own).sum(-1) - (towards_own * without).sum(-1) / 2
        return cross_entropy(SCALE * logits.scatter(1, own[:, None], right[:, None]), own)


def orders(count: int, seed: int) -> Iterator[Tensor]:
    """Batches of records, each record once a pass."""
    generator, left = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    while True:
        if len(left) < BATCH:
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        yield left[:BATCH]
        left = left[BATCH:]


def train(way: str, top: Top, texts: Texts, steps: int, seed: int, look: Callable[[Tensor | None], None]) -> None:
    """Train; ``look`` is called ten times, with the head's weights (C, d) where there is a head."""
    count, classes = len(texts.labels), int(texts.labels.max()) + 1
    loss_of = LeaveOneOut(states := top.read(texts), texts.labels)
    width = states.shape[1]
    head = nn.Linear(width, classes, bias=False)
    nn.init.normal_(head.weight, std=0.02)
    prior_std = math.sqrt(2 / width)
    log_std = nn.Parameter(torch.full_like(head.weight, math.log(prior_std / 40)))
    posterior = None
    stds: list[Tensor] = [log_std] if way == "a Gaussian" else []
    if way == "class means under noise":
        posterior = bayesianize(top.model, BlobConfig(prior_std=0.4, std_gradient="reparameterization"))
        posterior.watch.silent = True  # its KL is below
        stds = [*posterior.named_std_parameters().values()]
    weights: list[Tensor] = [p for p in top.parameters() if p.requires_grad and all(p is not std for std in stds)]
    with_head = way in ("a point", "a Gaussian")
    weights += [head.weight] if with_head else []
    optimizer = torch.optim.AdamW(weights, LEARNING_RATE, weight_decay=0.0)
    if stds:
        optimizer.add_param_group({"params": stds, "lr": 16 / steps})
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(0.06 * steps), steps)
    top.train()
    for step, rows in zip(range(1, steps + 1), orders(count, seed), strict=False):
        read = top([texts.below[i] for i in rows])
        if not with_head:
            loss = loss_of(read, rows)
        else:
            logits, labels = head(read), texts.labels[rows]
            loss = cross_entropy(logits, labels)
            if way == "a Gaussian":
                variance = read.square() @ log_std.exp().square().T
                kl = NormalPrior(prior_std).kl([head.weight], [log_std], "log")
                loss = loss + CATEGORICAL.noise_cost(logits, variance, labels).mean() + kl / count
        if posterior is not None:
            loss = loss + 0.1 / count * posterior.kl()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % (steps // 10) == 0:
            look(head.weight.detach() if with_head else None)


def classified(top: Top, parts: dict[str, Texts], head: Tensor | None) -> dict[str, dict[str, Any]]:
    """What each way to classify makes of what the LoRA has learned."""
    states = {name: Read(top.read(texts), texts.labels) for name, texts in parts.items()}
    known, by_means = states["train"], []
    for shrinkage in SHRINKAGES:
        weights = discriminant(known.read, known.labels, shrinkage)
        by_means.append((scored(states, partial(linear, weights)) | {"shrinkage": shrinkage}, weights))
    best, weights = min(by_means, key=lambda pair: pair[0]["validation nll"])
    found = {"class means": best}
    if head is not None:
        own = found["its head"] = scored(states, partial(linear, head))
        average = weights / best["temperature"] + head / own["temperature"]  # of log-probabilities, but for a constant
        found["both"] = scored(states, partial(linear, average))
    return found


def linear(weights: Tensor, read: Tensor) -> Tensor:
    """Logits (1, n, C) of a head, the one draw that `scored` is given."""
    return (read @ weights.T)[None]


@cache
def parts_of(name: str, records: int, blocks: int) -> dict[str, Texts]:
    """The texts of the support desk, ``records`` of each label to train on."""
    path = models.resolve(name)
    tokenizer, model = models.load_tokenizer(path), AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    read = {part: read_records(f"support_desk:{part}", require_labels=False) for part in PARTS}
    read["train"] = runs.select(read["train"], records)
    classes = sorted({record["label"] for record in read["train"]})
    return {part: texts_of(model, tokenizer, rows, classes, blocks) for part, rows in read.items()}


def measure(records: int, way: str, seed: int, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """One training: of each way to classify, the checkpoint with the lowest validation NLL."""
    parts = parts_of(options.model, records, options.top_blocks)
    model = AutoModel.from_pretrained(models.resolve(options.model), dtype=torch.float32).eval()
    set_seed(seed)
    top = Top(model, options.top_blocks)
    best: dict[str, dict[str, Any]] = {}

    def look(head: Tensor | None) -> None:
        for name, row in classified(top, parts, head).items():
            if row["validation nll"] < best.get(name, {"validation nll": math.inf})["validation nll"]:
                best[name] = row

    train(way, top, parts["train"], max(10, options.steps * records // 120 * 10), seed, look)
    return best


def main() -> None:
    """Measure, write, print."""
    parser = parser_of(__doc__, "class_means")
    parser.add_argument("--model", default=models.DEFAULT_MODEL)
    parser.add_argument("--records", type=int, nargs="+", default=[6, 12], help="of each label to train on, up to 12")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--steps", type=int, default=200, help="for 12 records a label, and in proportion for fewer")
    parser.add_argument("--top-blocks", type=int, default=10)
    options = parser.parse_args()
    found: dict[str, Any] = kept(options.results).get("results", {})
    for records in options.records:
        for seed in options.seeds:
            for way in options.ways:
                name = f"{records} records a label, {way}, seed {seed}"
                if name not in found:
                    row = measure(records, way, seed, options)
                    (options.results / "runs").mkdir(parents=True, exist_ok=True)
                    scores = {by: one.pop("scores") for by, one in row.items()}
                    write_tensors(
                        options.results / "runs" / f"{name}.safetensors",
                        {f"{by}/{key}": of_by[key] for by, of_by in scores.items() for key in ("nll", "accuracy")},
                    )
                    found = kept(options.results).get("results", {}) | {name: row}
                    differences = compared(found, options.results / "runs")
                    content = {"results": found, "machine": machine()}
                    keep(options.results, content, page(found, differences))
                    print(name, {by: (round(one["nll"], 3), round(one["accuracy"], 3)) for by, one in row.items()})


def grouped(names: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """The runs of each number of records and way, a run a seed."""
    found: dict[str, dict[str, list[str]]] = {}
    for name in sorted(names, key=lambda name: int(name.split()[0])):
        records, way, _ = name.split(", ")
        found.setdefault(records, {}).setdefault(way, []).append(name)
    return found


def compared(found: dict[str, dict[str, Any]], folder: Path) -> dict[str, dict[str, dict[str, Interval]]]:
    """NLL and accuracy of each way to train and to classify less those of a plain LoRA, with an interval."""

    def scores(names: Sequence[str], by: str) -> list[dict[str, Tensor]]:
        files = (read_tensors(folder / f"{name}.safetensors", ValueError) for name in names)
        return [{key: tensors[f"{by}/{key}"] for key in ("nll", "accuracy")} for tensors in files]

    result: dict[str, dict[str, dict[str, Interval]]] = {}
    for records, ways in grouped(found).items():
        for way, names in ways.items():
            own, plain = ({name.rpartition(" ")[2]: name for name in of} for of in (names, ways.get(REFERENCE, [])))
            both = own.keys() & plain.keys()
            for by in found[names[0]] if both else ():
                pair = scores([own[seed] for seed in both], by), scores([plain[seed] for seed in both], "its head")
                row = {f"Δ {metric}": paired_bootstrap(*pair, metric) for metric in ("nll", "accuracy")}
                result.setdefault(records, {})[f"{way}; by {by}"] = row
    return result


def page(found: dict[str, dict[str, Any]], differences: dict[str, dict[str, dict[str, Interval]]]) -> str:
    """Means over the seeds."""
    text = "# A head that is integrated out\n\nMade by `python benchmarks/class_means.py`, whose docstring says how. "
    text += f"Differences are from “{REFERENCE}; by its head”, a plain LoRA, with the same seeds. Machine, versions, "
    text += "each seed: results.json.\n"
    columns = ["accuracy", "nll", "AUROC of the entropy", "temperature"]
    for records, ways in grouped(found).items():
        table: dict[str, dict[str, Any]] = {}
        for way, names in ways.items():
            for by in found[names[0]]:
                means = {column: mean(found[name][by][column] for name in names) for column in columns}
                row = means | {"seeds": len(names)} | differences.get(records, {}).get(f"{way}; by {by}", {})
                table[f"{way}; by {by}"] = row
        rows = dict(sorted(table.items(), key=lambda pair: pair[1]["nll"]))
        text += f"\n## {records}\n\n{markdown_table(rows, [*columns, 'Δ nll', 'Δ accuracy', 'seeds'])}"
    return text


if __name__ == "__main__":
    main()
