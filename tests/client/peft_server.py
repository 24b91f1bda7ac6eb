"""Stock PEFT behind the OpenAI API's ``/v1/completions``: all adapters of an export on one model, by name.

    python peft_server.py FOLDER PORT

serves each export in the folder at ``/<its name>/v1/completions``, and loads it when it is first asked for.

Of the API it has what the tests ask for: token ids as prompts, greedy answers, ``allowed_token_ids``, ``echo``,
``logprobs``. It knows nothing of bloblora; that vLLM answers in the same form is tests/client/test_vllm.py's to show.
As vLLM does (its issue 51594) it leaves a LoRA on the head out of a prompt's log-probabilities.
"""

import json
import sys
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(manifest["base_model"])
    first, *others = [manifest["mean"], *manifest["draws"]]
    model = PeftModel.from_pretrained(base, folder / first, first)
    for name in others:
        model.load_adapter(folder / name, name)
    return model.eval(), AutoTokenizer.from_pretrained(folder / "tokenizer")


@contextmanager
def without_lora(layer):
    layer.forward = getattr(layer, "base_layer", layer).forward
    try:
        yield
    finally:
        del layer.forward


@torch.no_grad()
def complete(model, tokenizer, body):
    model.set_adapter(body["model"])
    ids = list(body["prompt"])
    for _ in range(body["max_tokens"]):
        logits = model(torch.tensor([ids])).logits[0, -1]
        allowed = body.get("allowed_token_ids") or range(len(logits))
        ids.append(max(allowed, key=lambda token: logits[token]))
        if ids[-1] == tokenizer.eos_token_id:
            break
    head = model.get_base_model().get_output_embeddings()
    with nullcontext() if not body.get("echo") else without_lora(head):
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    start = 0 if body.get("echo") else len(body["prompt"])
    scores = [None, *(log_probs[i, token].item() for i, token in enumerate(ids[1:]))]
    tops = [log_probs[max(i - 1, 0)].topk(body["logprobs"]) for i in range(start, len(ids))]
    top = [{f"token_id:{i}": value for value, i in zip(*(x.tolist() for x in found), strict=True)} for found in tops]
    for i, found in enumerate(top, start=start):  # the token itself comes too
        found[f"token_id:{ids[i]}"] = log_probs[max(i - 1, 0), ids[i]].item()
    text = tokenizer.decode(ids[start:], skip_special_tokens=True)
    return {"choices": [{"text": text, "logprobs": {"token_logprobs": scores[start:], "top_logprobs": top}}]}


def main(folder, port):
    torch.set_num_threads(1)
    loaded, lock = {}, Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name, rest = self.path.removeprefix("/").split("/", 1)
            assert rest == "v1/completions", self.path
            with lock:
                if name not in loaded:
                    loaded[name] = load(Path(folder, name))
                model, tokenizer = loaded[name]
                known = body["model"] in model.peft_config
                answer = complete(model, tokenizer, body) if known else {"error": f"no model {body['model']}"}
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
