"""Predictions and trainings in several threads at once: each is what it is alone."""

import asyncio
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch

from bloblora import bayesianize, predict, runs
from bloblora.contexts import eval_mode
from bloblora.methods import METHODS, laplace
from bloblora.prediction import Tempered, hidden_states
from tests.conftest import tiny_llama, with_lora
from tests.prediction.conftest import tiny_classifier
from tests.tiny_base import QUESTIONS, queries, write_jsonl

QUICK = {"ensemble": {"members": 2}, "mixture": {"members": 2}, "distilled": {"distill_steps": 1}}
# Draws that share blocks, replaced in the model's forward; a head that is computed in part; forward-mode gradients.
OTHERS = {
    "top blocks": ("blob", {"top_blocks": 1}),
    "letters": ("mixture", {"task": "choice_letter", "target_modules": ["q_proj", "lm_head"]}),
    "letters of members": ("ensemble", {"task": "choice_letter", "target_modules": ["q_proj", "lm_head"]}),
    "forward mode": ("laplace-lora", {}),
    "temperature": ("mc-dropout", {}),
}
ASKED = [(0, 0), (3, 1), (3, 2), (2, 1)]


@pytest.fixture
def run(request, base, tmp_path, monkeypatch):
    """A run of a method, or of one of `OTHERS`, after two steps of training."""
    method, options = OTHERS.get(request.param, (request.param, {}))
    if request.param == "forward mode":
        monkeypatch.setattr(laplace, "_CLASSES_A_DRAW", 0)
    records = QUESTIONS * 2 if "task" in options else queries()
    given = {"model": str(base), "method": method, "steps": 2, "batch_size": 2, "r": 2, "learning_rate": 0.05}
    config = runs.RunConfig.of(
        data=str(write_jsonl(tmp_path / "data.jsonl", records)),
        output=str(tmp_path / "run"),
        **given | QUICK.get(method, {}) | options,
    )
    run = runs.train(config, progress=False)
    if request.param == "temperature":
        run.sampler = Tempered(run.sampler, 2.0, 2.0)
    return run


def test_trainings_in_threads_are_those_alone(base, tmp_path):
    settings = {"data": queries(), "model": str(base), "steps": 20, "batch_size": 2, "r": 2, "learning_rate": 0.05}

    def train(name):
        config = runs.RunConfig.of(output=str(tmp_path / name), **settings)
        return runs.train(config, progress=False).adapter_sha256

    with ThreadPoolExecutor(2) as pool:
        assert {train("alone"), *pool.map(train, ["one", "other"])} == {train("again")}


@pytest.mark.parametrize("run", [*METHODS, *OTHERS], indirect=True)
def test_each_thread_has_the_answers_of_one_alone(run):
    model = run.model.train()
    records = [{k: v for k, v in record.items() if k not in ("label", "answer")} for record in QUESTIONS + queries()]
    records = [record for record in records if ("text" in record) == (run.task.labels is not None)]
    examples = run._examples(records)
    batch = run.task.collate(examples)

    def ask(num_samples, seed):
        if seed == 2:
            return hidden_states(model, examples, task=run.task, sampler=run.sampler)
        return run.predict(records, num_samples, seed).log_probs

    @torch.no_grad()
    def plain(context=nullcontext):
        torch.manual_seed(0)
        with context(model):
            return run.task.logits(model, batch)

    expected, forward, noisy = {asked: ask(*asked) for asked in ASKED}, plain(eval_mode), plain()
    modes = [module.training for module in model.modules()]
    weights = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    start = threading.Barrier(4)

    def work(number):
        start.wait()
        turns = [ASKED[(number + turn) % len(ASKED)] for turn in range(8)]
        return [(asked, ask(*asked)) for asked in turns]

    def look_on(_):
        start.wait()
        return [plain(eval_mode) for _ in range(12)]

    with ThreadPoolExecutor(4) as pool:
        seen = pool.submit(look_on, 3)
        for answers in pool.map(work, range(3)):
            for asked, answer in answers:
                torch.testing.assert_close(answer, expected[asked], rtol=0, atol=1e-5)
        for logits in seen.result():
            torch.testing.assert_close(logits, forward, rtol=0, atol=1e-5)
    assert [module.training for module in model.modules()] == modes
    assert weights == {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())
    torch.testing.assert_close(plain(), noisy, rtol=0, atol=1e-5)  # the noise of a training is what it was


@pytest.fixture
def bayesian():
    model = with_lora(tiny_llama())
    return model, bayesianize(model)


@torch.no_grad()
def test_draws_of_two_threads_overlap(bayesian, tokens):
    model, posterior = bayesian
    torch.manual_seed(0)
    noisy = model.train()(tokens).logits

    def alone(seed):
        with posterior.draw(seed):
            return model(tokens).logits

    entered, left = threading.Event(), threading.Event()

    def first():
        with posterior.draw(0):
            entered.set()
            left.wait()
            return model(tokens).logits

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(torch.no_grad()(first))
        entered.wait()
        with posterior.draw(1):
            second = model(tokens).logits
        torch.manual_seed(0)
        assert torch.equal(model(tokens).logits, noisy)  # here no draw is in force
        with posterior.mean():
            mean = model(tokens).logits
        left.set()
        assert torch.equal(found.result(), alone(0))
    assert torch.equal(second, alone(1))
    torch.manual_seed(0)
    assert torch.equal(model(tokens).logits, noisy)
    assert torch.equal(mean, model.eval()(tokens).logits)


@torch.no_grad()
def test_tasks_of_asyncio_have_draws_of_their_own(bayesian, tokens):
    model, posterior = bayesian
    model.eval()

    async def draw(seed):
        with posterior.draw(seed):
            await asyncio.sleep(0)
            here = model(tokens).logits
            return here, await asyncio.to_thread(torch.no_grad()(model), tokens)

    async def both():
        return await asyncio.gather(draw(0), draw(1))

    for seed, (here, in_thread) in enumerate(asyncio.run(both())):
        with posterior.draw(seed):
            expected = model(tokens).logits
        torch.testing.assert_close(here, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(in_thread.logits, expected, rtol=0, atol=1e-5)


def test_a_backward_in_autograds_thread_recomputes_the_draw(bayesian, tokens):
    """As on a GPU, where gradient checkpointing recomputes in a thread that nobody started in Python."""
    model, posterior = bayesian
    means = [*posterior.named_means().values()][:1] + [p for n, p in model.named_parameters() if "lora_B" in n]

    def gradients(backward):
        model.zero_grad()
        with posterior.draw(0):
            loss = model(tokens, labels=tokens).loss
            backward(loss)
        return [p.grad for p in means if p.grad is not None]

    model.train()
    expected = gradients(torch.Tensor.backward)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    with ThreadPoolExecutor(1) as pool:
        found = gradients(lambda loss: pool.submit(loss.backward).result())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)

        def ambiguous(loss):
            inside, done = threading.Event(), threading.Event()

            def hold():
                with posterior.draw(1):
                    inside.set()
                    done.wait()

            holder = threading.Thread(target=hold)
            holder.start()
            inside.wait()
            try:
                pool.submit(loss.backward).result()
            finally:
                done.set()
                holder.join()

        with pytest.raises(RuntimeError, match="several threads have draws in force"):
            gradients(ambiguous)


def test_a_forked_child_predicts(tokens):
    """Its parent's threads aren't there: it would wait for them for ever."""
    model, before = with_lora(tiny_classifier(), ("q_proj",)), torch.get_num_threads()
    bayesianize(model)
    inputs = {"input_ids": tokens.repeat(8, 8)}
    torch.set_num_threads(2)
    try:
        expected = predict(model, inputs, 4).probabilities
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            os._exit(0 if torch.allclose(predict(model, inputs, 4).probabilities, expected, atol=1e-5) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)
