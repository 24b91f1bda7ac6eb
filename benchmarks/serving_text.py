"""How soon does `bloblora serve` send the first token of an answer, and how many answers a second?

    python benchmarks/serving_text.py runs/answers runs/plain

The first run is Bayesian, the second a plain LoRA of the same model; both write text, and one server has both. First
tokens are streamed to one client on the loopback; in each round the plain LoRA, the posterior mean and N weight samples
take turns (the last N also with each token by the average over the samples, `decoding: average`), and each time is
divided by the plain LoRA's in that round. Then 1, 4 and 16 clients post prompts for a few seconds each, every client
the next as soon as it has its answer. The clients share the server's machine. What results/serving_text/results.json
has is not repeated.
"""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import Any

import httpx
from common import keep, kept, parser_of, ratios, spread, times
from serving import server

from bloblora import evaluation
from bloblora.studies.job import machine

PLAIN = "plain LoRA"


def prompt(number: int) -> str:
    """A question that wasn't asked before, of the same length in words."""
    return f"Question: Which is more, {100 + number % 900} stones or {999 - number % 900} birds?\nAnswer:"


def first_token(client: httpx.Client, body: dict[str, Any], numbers: "count[int]") -> None:
    """Wait for the first token, then go away, which ends the answer."""
    asked = {**body, "prompt": prompt(next(numbers)), "stream": True}
    with client.stream("POST", "/v1/completions", json=asked) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["tokens"]["texts"]:
                return
    raise SystemExit(f"no token of an answer to {asked['prompt']!r}")


def load(client: httpx.Client, body: dict[str, Any], clients: int, seconds: float) -> dict[str, float]:
    """Answers a second and the median time of one, of those that were asked for within so many seconds."""
    start, numbers = time.perf_counter(), count()

    def work() -> list[float]:
        taken = []
        while (begun := time.perf_counter()) - start < seconds:
            client.post("/v1/completions", json={**body, "prompt": prompt(next(numbers))}).raise_for_status()
            taken.append(time.perf_counter() - begun)
        return taken

    with ThreadPoolExecutor(clients) as pool:
        taken = [one for future in [pool.submit(work) for _ in range(clients)] for one in future.result()]
    return {"answers a second": len(taken) / (time.perf_counter() - start), "seconds of one": spread(taken)["median"]}


def main() -> None:
    """Measure what is missing, write, print."""
    parser = parser_of(__doc__, "serving_text")
    parser.add_argument("run", help="folder of a Bayesian run that writes text")
    parser.add_argument("plain", help="folder of a plain LoRA's run on the same model")
    parser.add_argument("--samples", type=int, nargs="+", default=[0, 1, 10], help="numbers of weight samples N")
    parser.add_argument("--tokens", type=int, default=16, help="most tokens of an answer")
    parser.add_argument("--rounds", type=int, default=15, help="of first tokens")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=15, help="of each load")
    options = parser.parse_args()
    results = kept(options.results)
    bodies: dict[str, dict[str, Any]] = {PLAIN: {"model": "plain", "samples": 0}}
    bodies |= {f"N = {samples}": {"model": "run", "samples": samples} for samples in options.samples}
    last = f"N = {options.samples[-1]}"
    bodies[f"{last}, average"] = {**bodies[last], "decoding": "average"}
    bodies = {name: {**body, "max_tokens": options.tokens} for name, body in bodies.items()}
    with (
        server([f"run={options.run}", f"plain={options.plain}"], 16, 10) as url,
        httpx.Client(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client,
    ):
        if "first token" not in results:
            numbers = count()
            turns = {name: partial(first_token, client, body, numbers) for name, body in bodies.items()}
            seconds = times(turns, options.rounds)
            shares = ratios(seconds, PLAIN)
            results["machine"] = {**machine(), "load average before": os.getloadavg()[0]}
            results["first token"] = {
                name: {"seconds": spread(values), "over the plain LoRA's": spread(shares[name])}
                for name, values in seconds.items()
            }
            keep(options.results, results)
        loads = results.setdefault("load", {})
        for name, body in bodies.items():
            for clients in options.clients:
                if (case := f"{name}, {clients} clients") not in loads:
                    loads[case] = load(client, body, clients, options.seconds)
                    print(case, loads[case], flush=True)
                    keep(options.results, results)
    first = {
        name: {f"{what}, {part}": value for what, parts in found.items() for part, value in parts.items()}
        for name, found in results["first token"].items()
    }
    text = "# Texts by `bloblora serve`\n\nMade by `python benchmarks/serving_text.py`, whose docstring says how.\n"
    for title, rows in (("First token", first), ("Answers", loads)):
        text += f"\n## {title}\n\n{evaluation.markdown_table(rows, [*next(iter(rows.values()))])}"
    keep(options.results, results, text)
    print(text)


if __name__ == "__main__":
    main()
