"""Adapters as the published BLoB code saves them, and what its own layers would answer."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bloblora import find_posterior, runs
from bloblora.cli import main
from bloblora.runs import RunError, import_adapter
from tests.tiny_base import QUESTIONS

TARGETS, R, ALPHA = ("q_proj", "v_proj", "lm_head"), 4, 8
WRAPPED = "base_model.model.base_model.model."


@pytest.fixture(scope="module")
def theirs(base, tmp_path_factory):
    """Its files for a tiny model, with random weights: A, B and ρ of each layer, by the layer's name."""
    folder = tmp_path_factory.mktemp("theirs")
    model, layers, generator = AutoModelForCausalLM.from_pretrained(base), {}, torch.Generator().manual_seed(0)
    for name, layer in model.named_modules():
        if name.endswith(TARGETS):
            m, n = layer.weight.shape
            rho = 0.3 + 0.3 * torch.rand(R, n, generator=generator)
            a, b = torch.randn(R, n, generator=generator), torch.randn(m, R, generator=generator)
            layers[name] = {"lora_A.weight": 0.2 * a, "lora_B.weight": 0.2 * b, "lora_A_rho": rho}
    tensors = {f"{WRAPPED}{name}.{kind}": t for name, layer in layers.items() for kind, t in layer.items()}
    save_file(tensors | {f"{WRAPPED}lm_head.base_layer.weight": model.lm_head.weight.detach().clone()},
              folder / "adapter_model.safetensors")  # fmt: skip
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": R, "lora_alpha": ALPHA, "lora_dropout": 0.0}
    config |= {"target_modules": [*TARGETS], "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, layers


@torch.no_grad()
def answers(base, layers, noise, alphas=None):
    """Probabilities of the letters by the formula of its layers: W₀x + s·B(Ax) + s·B((x∘r)(σ∘E)ᵀ∘t), signs r and t."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)

    def adapted(name):
        a, b, rho = layers[name].values()

        def forward(module, arguments, output):
            (x,) = arguments
            added = x @ a.T
            if noise:
                e, r, t = noise[name]
                added = added + ((x * r) @ (rho**2 * e).T) * t
            return output + (alphas or {}).get(name.rpartition(".")[2], ALPHA) / len(a) * added @ b.T

        return forward

    for name in layers:
        model.get_submodule(name).register_forward_hook(adapted(name))
    found = []
    for question in QUESTIONS:
        letters = "ABC"[: len(question["choices"])]
        lines = "\n".join(f"{letter}) {text}" for letter, text in zip(letters, question["choices"], strict=True))
        text = f"Return the label of the correct answer for the question below.\n\nQuestion: {question['question']}"
        ids = tokenizer(f"{text}\nChoices:\n{lines}\nAnswer:", return_tensors="pt").input_ids
        targets = [tokenizer(f" {letter}").input_ids[-1] for letter in letters]
        found.append(model(ids).logits[0, -1, targets].softmax(-1))
    return found


@pytest.mark.parametrize("drawn", [False, True])
def test_answers_are_those_of_its_layers(theirs, base, tmp_path, drawn):
    folder, layers = theirs
    run = import_adapter(folder, tmp_path / "run")
    assert (run.method.std_parameterization, run.task.name, run.task.max_length) == ("square", "choice_letter", 300)
    posterior, noise = find_posterior(run.model), {}
    if drawn:
        weights = {}
        for name, layer in layers.items():
            a, _, rho = layer.values()
            e, r, t = torch.randn(a.shape), torch.randn(a.shape[1]).sign(), torch.randn(R).sign()
            noise[name] = e, r, t
            weights[f"base_model.model.{name}"] = {"A": a + t[:, None] * rho**2 * e * r}
        context = posterior.fixed(weights)
        stds = posterior.named_stds()
        torch.testing.assert_close(stds["base_model.model.lm_head.lora_A"], layers["lm_head"]["lora_A_rho"] ** 2)
    else:
        context = posterior.mean()
    with context, torch.no_grad():
        batch = run.task.collate(run._examples(QUESTIONS))
        found = run.task.logits(run.model, batch).softmax(-1)
    for row, expected in zip(found, answers(base, layers, noise), strict=True):
        torch.testing.assert_close(row[: len(expected)], expected, rtol=1e-4, atol=1e-5)
    assert runs.open_run(tmp_path / "run").training == {"imported": str(folder)}


@pytest.mark.parametrize(
    "options",
    [{"alpha_pattern": {"q_proj": 64}}, {"rank_pattern": {"v_proj": 2}}, {"layers_to_transform": [0]}],
    ids=str,
)
def test_options_of_single_layers_are_taken_over(options, theirs, base, tmp_path):
    folder, layers = theirs
    if "layers_to_transform" in options:
        layers = {name: layer for name, layer in layers.items() if ".layers.1." not in name}
    for name, rank in options.get("rank_pattern", {}).items():
        cut = {key: {n: t[:, :rank] if "_B" in n else t[:rank] for n, t in layers[key].items()}
               for key in layers if key.endswith(name)}  # fmt: skip
        layers = layers | cut
    config = json.loads((folder / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | options))
    tensors = {f"{WRAPPED}{name}.{kind}": t.contiguous() for name, of in layers.items() for kind, t in of.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    found = import_adapter(tmp_path, tmp_path / "run").predict(QUESTIONS, 0).probabilities
    expected = answers(base, layers, {}, options.get("alpha_pattern"))
    for row, letters in zip(found, expected, strict=True):
        torch.testing.assert_close(row[: len(letters)].float(), letters, rtol=1e-4, atol=1e-5)


def test_the_command_says_what_to_type_next(theirs, tmp_path, capsys):
    main(["import", str(theirs[0]), "--output", str(tmp_path / "my run")])
    assert f"next: bloblora evaluate '{tmp_path / 'my run'}' --data FILE" in capsys.readouterr().out
    main(["info", str(tmp_path / "my run"), "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["training"] == {"imported": str(theirs[0])}
    assert shown["posterior"]["kl"] > 0  # against the prior of that training


def test_what_cannot_be_imported(theirs, base, tmp_path):
    folder, layers = theirs
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {f"{WRAPPED}{name}.{kind}": t for name, layer in layers.items() for kind, t in layer.items()}
    plain = {name: tensor for name, tensor in tensors.items() if "rho" not in name}
    fewer = {name: tensor for name, tensor in tensors.items() if "lm_head" not in name}
    for number, (changes, saved, message) in enumerate(
        [
            ({}, plain, "no lora_A_rho in it, so it isn't an adapter of the published BLoB code"),
            ({"task_type": None}, tensors, "task_type is None; only adapters of language models"),
            ({"base_model_name_or_path": None}, tensors, "it names no base model; give one"),
            ({}, fewer, "its layers aren't the base model's: they differ in base_model.model.lm_head.lora_A"),
            ({"r": 2}, tensors, "it doesn't fit the base model"),
            ({"use_dora": True, "bias": "all"}, tensors, "use_dora is True, bias is 'all'; an adapter with that"),
            ({"modules_to_save": ["norm"], "loftq_config": {}}, tensors, "modules_to_save is ['norm']; an adapter"),
            ({"init_lora_weights": "pissa"}, tensors, "init_lora_weights is 'pissa'; an adapter with that can't be"),
        ]
    ):
        place = tmp_path / str(number)
        place.mkdir()
        (place / "adapter_config.json").write_text(json.dumps(config | changes))
        save_file(saved, place / "adapter_model.safetensors")
        with pytest.raises(RunError, match=re.escape(message)):
            import_adapter(place, tmp_path / "run")
        assert not (tmp_path / "run" / "run.json").exists()
