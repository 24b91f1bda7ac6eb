"""Answer questions in words, and withhold answers on which the weight samples do not agree.

    python examples/qa_uncertainty.py
    python examples/qa_uncertainty.py --samples 10 --agreement 0.9

BLoB learns the form of an answer from a few capitals; the capitals themselves the base model knows or does not. It is
then asked about countries that it was not trained on, and about countries that do not exist. Every weight sample writes
an answer of its own. If too few pairs of samples agree, the question is refused.

The counts only illustrate.
"""

import argparse
import json
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bloblora import posterior_generate, runs
from bloblora.models import DEFAULT_MODEL

TRAIN = """France Paris, Japan Tokyo, Egypt Cairo, Peru Lima, Kenya Nairobi, Norway Oslo, Greece Athens, Cuba Havana,
Ireland Dublin, Portugal Lisbon, Chile Santiago, Austria Vienna, Iraq Baghdad, Nepal Kathmandu, Finland Helsinki,
Jordan Amman, Ghana Accra, Hungary Budapest, Poland Warsaw, Thailand Bangkok, Qatar Doha, Latvia Riga, Syria Damascus,
Sweden Stockholm"""
KNOWN = """Italy Rome, Spain Madrid, Russia Moscow, China Beijing, Denmark Copenhagen, Iran Tehran, Germany Berlin,
Belgium Brussels, Turkey Ankara, Ukraine Kyiv/Kiev, Canada Ottawa, Bulgaria Sofia, Senegal Dakar, Fiji Suva"""
INVENTED = ("Velmoria", "Quendalia", "Ostrovania", "Tamberland", "Zirkonia", "Bellmark", "Uruvia", "Northaven")


def main(arguments: list[str] | None = None) -> None:
    """Train, ask, print what is answered and what is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--samples", type=int, default=10, help="number of weight samples N")
    parser.add_argument("--agreement", type=float, default=0.6, help="smallest share of agreeing pairs of samples")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "train.jsonl"
        records = [{"prompt": prompt(country), "response": capital} for country, capital in pairs(TRAIN).items()]
        data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        config = runs.RunConfig.of(
            data=str(data),
            output=f"{folder}/run",
            model=options.model,
            steps=options.steps,
            batch_size=8,
        )
        run = runs.train(config)
    truth = pairs(KNOWN) | dict.fromkeys(INVENTED, "")
    inputs = run.tokenizer(
        [prompt(country) for country in truth], padding=True, padding_side="left", return_tensors="pt"
    )
    inputs.pop("token_type_ids", None)
    found = posterior_generate(
        run.model,
        inputs,
        options.samples,
        tokenizer=run.tokenizer,
        max_new_tokens=6,
        do_sample=False,
        draws=True,
        progress=True,
    )
    table = Table("capital of", "answer", "which is", "agreement", "epistemic, nats", "so it is")
    counts = dict.fromkeys(((said, kind) for said in ("said", "refused") for kind in ("right", "wrong", "invented")), 0)
    for i, (country, capital) in enumerate(truth.items()):
        answer, agreement = found.texts[i].strip(), found.agreement[i].item()
        right = answer.lower().startswith(tuple(capital.lower().split("/")))
        kind = "invented" if not capital else "right" if right else "wrong"
        said = "said" if agreement >= options.agreement else "refused"
        counts[said, kind] += 1
        numbers = (f"{agreement:.2f}", f"{found.mutual_information[i]:.2f}")
        table.add_row(country, answer, kind, *numbers, said)
    Console().print(table)
    for said in ("said", "refused"):
        print(f"{said}:", ", ".join(f"{counts[said, kind]} {kind}" for kind in ("right", "wrong", "invented")))


def prompt(country: str) -> str:
    """The question about a country."""
    return f"Question: What is the capital of {country}?\nAnswer:"


def pairs(text: str) -> dict[str, str]:
    """Capital by country."""
    return dict(pair.split() for pair in text.split(","))


if __name__ == "__main__":
    main()
