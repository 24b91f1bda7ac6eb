"""What does scoring a text under N = 10 weight samples cost, against ten separate forwards at batch 1?

    python benchmarks/scoring.py

SmolLM2-135M with BLoB on q and v, untrained: in all blocks, and in the last quarter of them alone. A text is a prompt
and its response; ten separate passes take each under one draw of the weights, the whole sequence's logits at a time,
as a loop around a model's forward does. Times are medians of rounds in which all take turns. Writes
results/scoring/results.json and README.md.
"""

import argparse
import random
from typing import Any

import torch
from common import keep, parser_of, ratios, spread, times
from peft import LoraConfig, get_peft_model

from bloblora import BlobConfig, bayesianize, evaluation, models
from bloblora.generation import score
from bloblora.runs import RunConfig
from bloblora.studies.job import machine

DRAWS = 10


def separate(model: Any, posterior: Any, prompt: list[int], response: list[int]) -> list[torch.Tensor]:
    """Log-probability of the response's tokens under each draw, one forward after the other."""
    generator, found = torch.Generator().manual_seed(0), []
    ids = torch.tensor([prompt + response])
    for _ in range(DRAWS):
        with torch.no_grad(), posterior.draw(generator):
            log_probs = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        found.append(log_probs.gather(-1, torch.tensor(response)[:, None])[:, 0])
    return found


def measured(name: str, layers: list[int] | None, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Time of `score` over that of separate passes: of one text, and of several responses to one prompt."""
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], layers_to_transform=layers)
    model = get_peft_model(models.load_model(options.model), lora)
    posterior = bayesianize(model, BlobConfig())
    model.eval()
    random.seed(0)
    vocabulary = model.config.vocab_size
    prompt = random.choices(range(3, vocabulary), k=options.prompt)
    responses = [random.choices(range(3, vocabulary), k=options.response) for _ in range(options.responses)]
    expected = torch.stack(separate(model, posterior, prompt, responses[0]))
    found = score(model, [prompt], responses[:1], DRAWS, 0).draw_log_probs[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    tries = {
        "separate": lambda: separate(model, posterior, prompt, responses[0]),
        "one response": lambda: score(model, [prompt], responses[:1], DRAWS, 0),
        f"{len(responses)} responses": lambda: score(model, [prompt] * len(responses), responses, DRAWS, 0),
    }
    found = ratios(times(tries, options.rounds), "separate")
    return {
        f"{name}, {of}": spread([value / (1 if of == "one response" else len(responses)) for value in values])
        for of, values in found.items()
        if of != "separate"
    }


def main() -> None:
    """Measure the ratios: time a text of `score` over that of ten separate passes."""
    parser = parser_of(__doc__, "scoring")
    parser.add_argument("--model", default=RunConfig.model)
    parser.add_argument("--prompt", type=int, default=48, help="tokens of the prompt")
    parser.add_argument("--response", type=int, default=12, help="tokens of a response")
    parser.add_argument("--responses", type=int, default=4, help="responses to one prompt")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    blocks = models.load_model(options.model).config.num_hidden_layers
    rows: dict[str, dict[str, float]] = {}
    for name, layers in (("all blocks", None), ("last quarter", [*range(blocks - blocks // 4, blocks)])):
        rows |= measured(name, layers, options)
    lengths = f"{options.prompt} tokens of prompt and {options.response} of response; {options.rounds} rounds"
    text = f"# Scoring a text under {DRAWS} weight samples\n\nMade by `python benchmarks/scoring.py`; {lengths}. "
    text += "The time of a text, over that of ten separate passes. The machine is in results.json.\n\n"
    text += evaluation.markdown_table(rows, ["median", "lower quartile", "upper quartile"])
    print(text)
    keep(options.results, {"machine": machine(), "ratios": rows}, text)


if __name__ == "__main__":
    main()
