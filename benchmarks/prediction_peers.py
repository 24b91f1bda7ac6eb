"""What do other libraries' Bayesian predictions cost, beside N = 10 draws here?

    python benchmarks/prediction_peers.py

One LoRA, one batch of random tokens with four classes, one run in which all take turns: plain PEFT's one forward,
`predict` with ten draws, `Linearized`, this project's `laplace` (ten linearized draws), laplace-torch (its linearized
predictive with the probit approximation, and ten draws), and bayesian-lora (the Jacobian, the variance of the logits
and ten draws of them). What each predicts differs, as their posteriors do: only times are compared. Its posterior is
fitted outside of the clock. A library that isn't installed is left out and said so.

Writes results/prediction_peers/results.json and README.md.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import prediction as ours
import torch
from common import keep, parser_of, ratios, spread, times
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from bloblora import evaluation, find_posterior, models, predict
from bloblora.adapter import debayesianize
from bloblora.methods import Training
from bloblora.methods.laplace import fit_laplace
from bloblora.prediction import Linearized
from bloblora.studies.job import machine
from bloblora.tasks import Classification

SHAPES = ((1, 16), (1, 64), (4, 16))  # bayesian-lora at 16 × 16 takes more than 15 GB
NUM_SAMPLES, NUM_LABELS, EXAMPLES = ours.NUM_SAMPLES, 4, 16
PLAIN, DRAWS, LINEARIZED, LAPLACE = "plain LoRA, one forward", "predict", "Linearized", "method laplace"
LAPLACE_TORCH, LAPLACE_TORCH_DRAWS, BAYESIAN_LORA = "laplace-torch, probit", "laplace-torch, draws", "bayesian-lora"


class Logits(nn.Module):
    """A model as laplace-torch takes it: a batch is a mapping."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits (b, C)."""
        return self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def plain(name: str | None) -> Any:
    """A LoRA whose A and B alone are trained."""
    model = ours.bayesian(ours.load(name, NUM_LABELS).eval(), None)
    debayesianize(model)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in key)
    return model


def examples(vocabulary: int, tokens: int, number: int = EXAMPLES) -> list[dict[str, Any]]:
    """Random texts with random labels."""
    generator = torch.Generator().manual_seed(ours.SEED)
    ids = torch.randint(3, vocabulary, (number, tokens), generator=generator).tolist()
    return [{"input_ids": row, "truncated": 0, "label": i % NUM_LABELS} for i, row in enumerate(ids)]


def laplace_torch(name: str | None, task: Any, fitted: list[Any]) -> Callable[[str], Callable[[Any], Any]]:
    """Its Kronecker posterior over A and B."""
    from laplace import KronLaplace

    peer = KronLaplace(Logits(plain(name)), "classification", asdl_fisher_kwargs={"kfac_approx": "reduce"})
    peer.fit(DataLoader(fitted, batch_size=4, collate_fn=task.collate))  # type: ignore[arg-type]
    options = {"glm": {"link_approx": "probit"}, "nn": {"link_approx": "mc", "n_samples": NUM_SAMPLES}}
    return lambda kind: lambda batch: peer(batch, pred_type=kind, **options[kind])


def bayesian_lora(name: str | None, task: Any, fitted: list[Any]) -> Callable[[Any], Any]:
    """Its low-rank Kronecker posterior, with the prior's variance at 0.1 as in its example."""
    import bayesian_lora as peer
    from bayesian_lora.main import jacobian_mean

    model, rank, variance = plain(name), 8, torch.tensor(0.1)
    factors = peer.calculate_kronecker_factors(
        model,
        lambda model, batch: Logits(model)(batch),
        DataLoader(fitted, batch_size=4, collate_fn=task.collate),  # type: ignore[arg-type]
        n_kfac=10,
        lr_threshold=16,
        target_module_keywords=["lora"],
    )
    factors = peer.cholesky_decompose_small_factors(factors, 16, "cpu", torch.float32)

    def run(batch: Any) -> Tensor:
        jacobian, mean = jacobian_mean(model, batch, output_callback=lambda outputs: outputs.logits)
        covariance = peer.variance(batch, jacobian, factors, variance, NUM_LABELS, rank, 10, "cpu")
        noise = torch.randn(NUM_SAMPLES, *mean.shape, 1)
        return (mean + (peer.stable_cholesky(covariance) @ noise).squeeze(-1)).softmax(-1).mean(0)

    return run


def contestants(name: str | None, tokens: int, size: int) -> dict[str, Callable[[Any], Any]]:
    """What takes turns, each a function of a batch."""
    blob, lora = ours.bayesian(ours.load(name, NUM_LABELS).eval(), None), plain(name)
    posterior = find_posterior(blob)
    assert posterior is not None
    task = Classification(pad_token_id=lora.config.pad_token_id, labels=tuple("abcd"))
    fitted = examples(lora.config.vocab_size, tokens)
    training = Training(task, fitted, {"per_device_train_batch_size": 4, "seed": 0})
    layers = {n: m for n, m in lora.named_modules() if isinstance(m, torch.nn.Linear) and m.weight.requires_grad}
    laplace = fit_laplace(lora, layers, training)
    found: dict[str, Callable[[Any], Any]] = {
        PLAIN: torch.no_grad()(lambda batch: lora(**batch).logits),
        DRAWS: lambda batch: predict(blob, batch, NUM_SAMPLES),
        LINEARIZED: lambda batch: predict(blob, batch, NUM_SAMPLES, sampler=Linearized(posterior)),
        LAPLACE: lambda batch: predict(lora, batch, NUM_SAMPLES, sampler=laplace),
    }
    if find_spec("laplace"):
        peer = laplace_torch(name, task, fitted)
        found |= {LAPLACE_TORCH: peer("glm"), LAPLACE_TORCH_DRAWS: peer("nn")}
    if find_spec("bayesian_lora") and size > 1:  # its variance loses the dimension of a batch of one
        found[BAYESIAN_LORA] = bayesian_lora(name, task, fitted)
    return found


def main() -> None:
    """Measure, write, print."""
    parser = parser_of(__doc__, "prediction_peers")
    parser.add_argument("--model", default=models.DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, one round: to see that it works")
    options = parser.parse_args()
    name, rounds = (None, 1) if options.smoke else (options.model, options.rounds)
    cases, rows, left_out = {}, {}, [p for p in ("laplace", "bayesian_lora") if not find_spec(p)]
    for size, tokens in SHAPES:
        functions = contestants(name, tokens, size)
        made = examples(97, tokens, size)
        ids = torch.tensor([example["input_ids"] for example in made])
        batch = BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        seconds = times({key: lambda f=f, batch=batch: f(batch) for key, f in functions.items()}, rounds)
        case = f"{size} × {tokens}"
        cases[case] = {"ratios": {k: spread(v) for k, v in ratios(seconds, PLAIN).items()}, "seconds": seconds}
        rows[case] = {key: ratio["median"] for key, ratio in cases[case]["ratios"].items() if key != PLAIN}
        print(case, rows[case], flush=True)
    text = (
        "# Time of a Bayesian prediction, beside other libraries\n\n"
        "Made by `python benchmarks/prediction_peers.py`; machine and all times are in results.json. Forwards of plain "
        f"LoRA in the same round that each is worth, medians of {rounds} rounds; batch × tokens, {NUM_LABELS} classes, "
        f"r = 8, q and v. Everything that draws makes {NUM_SAMPLES} draws. bayesian-lora fails on a batch of one.\n\n"
    )
    text += evaluation.markdown_table(rows, list(rows[case])) + "".join(f"\nNot installed: {p}.\n" for p in left_out)
    keep(options.results, {"machine": machine(), "rounds": rounds, "model": name, "cases": cases}, text)
    print(text)


if __name__ == "__main__":
    main()
