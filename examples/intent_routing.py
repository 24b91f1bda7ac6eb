"""Route the queries of a support desk: answer them, hand them to a person, or flag them as out of scope.

    python examples/intent_routing.py                 # trains on the embedded queries
    python examples/intent_routing.py --risk 0.3

BLoB is trained on 288 queries with 24 intents. On 192 others two rules are calibrated, each with a guarantee: at most
`--risk` of the answered queries are wrong, with probability 95 %, and at most 5 % of the queries in scope are flagged
as out of scope, on average. Then 480 new queries and 200 that no intent fits are routed.
"""

import argparse
import tempfile

import torch
from rich.console import Console
from rich.table import Table

from bloblora import runs
from bloblora.data import support_desk
from bloblora.decision import Answering, Scope, fit_answering, fit_scope
from bloblora.models import DEFAULT_MODEL


def main(arguments: list[str] | None = None) -> None:
    """Train, calibrate, route, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--samples", type=int, default=5, help="number of weight samples N")
    parser.add_argument("--risk", type=float, default=0.2)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        config = runs.RunConfig.of(
            data="support_desk:train", output=folder, model=options.model, steps=options.steps, learning_rate=2e-3
        )
        run = runs.train(config)
    held_out = support_desk("validation")
    prediction = run.predict(held_out, options.samples, progress=True)
    scope = fit_scope(prediction.predictive_entropy)
    print("guaranteed:", scope.promise)
    answering = None
    try:
        answering = fit_answering(prediction.probabilities, runs.targets_of(run.task, held_out), options.risk)
        print("guaranteed:", answering.promise)
    except ValueError as error:  # it names the smallest risk that these records support
        print("nothing is answered:", error)
    route(run, answering, scope, options.samples)


def route(run: runs.Run, answering: Answering | None, scope: Scope, samples: int) -> None:
    """Where new queries go, and how often an answer is wrong."""
    table = Table(title="where queries go")
    for column in ("queries", "answered", "of these wrong", "to a person", "out of scope"):
        table.add_column(column, justify="left" if column == "queries" else "right")
    examples = []
    for split in ("test", "out_of_scope"):
        records = support_desk(split)
        prediction = run.predict(records, samples, progress=True)
        refused = scope.flags(prediction.predictive_entropy)
        sure = answering.answers(prediction.confidence) if answering else torch.zeros_like(refused)
        answered, person = sure & ~refused, ~sure & ~refused
        intents = [run.task.labels[label] for label in prediction.labels]
        wrong = [i for i in answered.nonzero()[:, 0].tolist() if intents[i] != records[i]["label"]]
        counts = (len(wrong), int(person.sum()), int(refused.sum()))
        table.add_row(f"{len(records)} {split}", str(int(answered.sum())), *map(str, counts))
        for where, chosen in (("answer", answered), ("a person", person), ("out of scope", refused)):
            examples += [
                (records[i]["text"], where, intents[i], prediction.confidence[i], prediction.mutual_information[i])
                for i in chosen.nonzero()[:2, 0].tolist()
            ]
    shown = Table(title="two of each")
    for column in ("query", "goes to", "likeliest intent", "confidence", "epistemic, nats"):
        shown.add_column(column, no_wrap=True, max_width=26)
    for text, where, intent, *numbers in examples:
        shown.add_row(text, where, intent, *(f"{number:.2f}" for number in numbers))
    Console().print(table, shown)


if __name__ == "__main__":
    main()
