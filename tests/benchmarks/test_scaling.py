"""Counted costs against closed forms, and what the report makes of times that are known."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import counting, gpu_estimate
from benchmarks import scaling as benchmark
from benchmarks.scaling import BLOB, FULL, PLAIN, Point

BASE = Point("tiny", 8, 2, "q and v")


def closed_form(point, method):
    """Two operations for each entry of a matrix and token; a backward has two such products, or one if W is frozen."""
    shape, tokens = benchmark.SIZES[point.size], benchmark.EXAMPLES * point.tokens
    n, blocks = shape["hidden_size"], shape["num_hidden_layers"]
    kv = n // shape["num_attention_heads"] * shape["num_key_value_heads"]
    linear = 2 * tokens * (2 * n * n + 2 * n * kv + 3 * n * shape["intermediate_size"])
    attention = 2 * 2 * tokens * point.tokens * n
    head = 2 * tokens * n * benchmark.NUM_LABELS
    if method == FULL:
        return 3 * (blocks * (linear + attention) + head)
    lora_a, lora_b = 2 * tokens * point.rank * 2 * n, 2 * tokens * point.rank * (n + kv)
    # The first block's input needs no gradient: none through its q, k, v and A, nor for its k.
    first = 2 * tokens * (n * n + 2 * n * kv) + lora_a + attention // 2
    return blocks * (2 * linear + 3 * (attention + lora_a + lora_b)) + 3 * head - first


@pytest.mark.parametrize("method", [PLAIN, BLOB, FULL])
@pytest.mark.parametrize("change", [{}, {"size": "small"}, {"tokens": 12}, {"rank": 8}], ids=str)
def test_arithmetic_of_a_step_is_the_closed_form(method, change):
    point = replace(BASE, **change)
    assert benchmark.flops(point, method) == closed_form(point, method)


def test_arithmetic_is_what_torch_counts_on_a_real_model():
    model = benchmark.load(BASE)
    batch = benchmark.batch_of(model, benchmark.EXAMPLES, BASE.tokens)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    assert benchmark.flops(BASE, FULL) == counter.get_total_flops() == counting.count(model, batch, backward=True).flops


def test_bytes_and_what_is_kept_of_two_linear_layers():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(16, 4, bias=False)

        def forward(self, x):
            return type("Output", (), {"loss": self.second(self.first(x).relu()).sum()})

    cost = counting.count(Two().to("meta"), {"x": torch.empty(5, 8, device="meta")})
    products = (40 + 128 + 80) + (80 + 64 + 20)
    assert cost.bytes == 4 * (products + 2 * 80 + 20 + 1)  # and ReLU, and the sum
    kept = counting.count(Two().to("meta"), {"x": torch.empty(5, 8, device="meta")}, backward=True)
    assert kept.saved == 4 * (40 + 80)  # x; the ReLU's output, which both that and the second product keep
    assert kept.flops == cost.flops + 2 * (5 * 16 * 8 + 2 * 5 * 16 * 4)  # x needs no gradient


def test_the_methods_compute_the_same_before_they_are_trained():
    batch = benchmark.batch_of(benchmark.load(BASE), benchmark.EXAMPLES, BASE.tokens)
    losses = [
        benchmark.model_of(method, benchmark.load(BASE), BASE).eval()(**batch).loss for method in (PLAIN, BLOB, FULL)
    ]
    torch.testing.assert_close(losses[1:], losses[:1] * 2)


def test_methods_share_the_weights_and_not_the_gradients():
    base = benchmark.load(BASE)
    copy = benchmark.same_storage(base)
    for (name, ours), theirs in zip(base.named_parameters(), copy.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr(), name
        assert ours is not theirs
    benchmark.model_of(PLAIN, copy, BASE)
    assert not copy.model.embed_tokens.weight.requires_grad
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_growth_of_a_power_with_known_noise(exponent):
    x = [1.0, 10.0, 100.0, 1000.0]
    exact = benchmark.growth(x, [3 * value**exponent for value in x])
    assert exact["exponent"] == pytest.approx(exponent, abs=1e-5)
    assert exact["standard error"] == pytest.approx(0, abs=1e-5)
    # by hand: u = -3, -1, 1, 3 (times ln 10 / 2), residuals e = +, -, -, + d are orthogonal to u and to 1
    d = 0.1
    noisy = benchmark.growth(x, [3 * value**exponent * math.exp(e) for value, e in zip(x, (d, -d, -d, d), strict=True)])
    assert noisy["exponent"] == pytest.approx(exponent, abs=1e-5)
    assert noisy["standard error"] == pytest.approx(math.sqrt(4 * d**2 / 2 / (20 * (math.log(10) / 2) ** 2)), rel=1e-4)


def test_smoke_is_resumable_and_its_report_complete(tmp_path, monkeypatch, capsys):
    def alone(_threads, function, *arguments):
        return {"peak": 2.0, "step": 1.0} if function is benchmark.memory else function(*arguments)

    monkeypatch.setattr(benchmark, "alone", alone)
    run = ["--smoke", "--threads", "1", "--results", str(tmp_path)]
    benchmark.main(run)
    results = (tmp_path / "results.json").read_text(encoding="utf-8")
    points = json.loads(results)
    assert len(points) == 5  # the base case is in each of four factors
    for found in points.values():
        full = (found["point"]["rank"], found["point"]["targets"]) == (2, "q and v")
        assert set(found["mib"]) == {PLAIN, BLOB} | ({FULL} if full else set())
        assert found["flops"][BLOB] == found["flops"][PLAIN]
    benchmark.main(run)
    assert (tmp_path / "results.json").read_text(encoding="utf-8") == results
    report = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert report in capsys.readouterr().out
    assert "| BLoB, N = 20 |" in report
    assert (tmp_path / "scaling.svg").read_text(encoding="utf-8").startswith("<svg")


def test_a_point_in_a_process_of_its_own():
    found = benchmark.alone(1, benchmark.memory, BASE, BLOB)
    assert found["peak"] > found["step"] > 0


TINY = gpu_estimate.SHAPES["Llama-2-7B"] | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 97,
}


def test_true_shapes_have_the_published_numbers_of_parameters():
    sizes = {name: gpu_estimate.build(shape, FULL).num_parameters() for name, shape in gpu_estimate.SHAPES.items()}
    assert sizes == {"Llama-2-7B": 6_738_415_616, "Llama-2-70B": 68_976_648_192}  # of their model cards


def test_blob_adds_its_parameters_and_its_noise():
    batch = gpu_estimate.batch_of(2, 8)
    (plain, of_plain), (blob, of_blob) = (gpu_estimate.training(TINY, method, batch) for method in (PLAIN, BLOB))
    entries = 3 * 2 * 8 * 64  # blocks, targets, r, n
    assert 1e9 * (of_blob["trained"] - of_plain["trained"]) == pytest.approx(16 * entries)
    assert of_blob["weights"] == of_plain["weights"]
    assert blob.flops == plain.flops
    assert 1e9 * (of_blob["activations"] - of_plain["activations"]) >= 2 * 4 * entries  # an E of each example


def test_checkpointing_computes_each_block_again_and_keeps_less():
    batch = gpu_estimate.batch_of(2, 8)
    for method in (PLAIN, BLOB, FULL):
        (cost, memory), (again, less) = (gpu_estimate.training(TINY, method, batch, flag) for flag in (False, True))
        forward = counting.count(gpu_estimate.build(TINY, method), batch).flops
        not_again = 2 * 16 * (64 * 97 + 3 * 128 * 64)  # the head, and of each block the last product
        # With checkpoints an adapter's embeddings need a gradient: so do the first block's inputs of q, k, v and A.
        first = 0 if method == FULL else 2 * 16 * (3 * 64 * 64 + 2 * 8 * 64)
        assert again.flops - cost.flops == forward - not_again + first, method
        assert less["activations"] < memory["activations"]


def test_seconds_of_an_operation_are_the_longest_of_three():
    gpu = gpu_estimate.Gpu({2: 1e12, 4: 1e11}, 1e12, 80e9)
    share, band = gpu_estimate.MATMUL_SHARE, gpu_estimate.BANDWIDTH_SHARE
    costs = [(1e12, 1, 2, 1 / share), (1e12, 1, 4, 10 / share), (0, 1e12, 4, 1 / band), (1, 1, 2, gpu_estimate.LAUNCH)]
    for flops, traffic, element, expected in costs:
        cost = counting.Cost([counting.Operation(int(flops), int(traffic), element)])
        assert gpu_estimate.seconds(cost, gpu) == pytest.approx(expected)


def test_draws_share_forwards_up_to_a_number_of_tokens():
    costs = gpu_estimate.prediction(TINY, gpu_estimate.batch_of(1, 2048), 10)
    assert len(costs) == 3  # four, four and two draws
    one = gpu_estimate.prediction(TINY, gpu_estimate.batch_of(1, 2048), 1)[0].flops
    assert [cost.flops for cost in costs] == [4 * one, 4 * one, 2 * one]
    totals = [sum(c.flops for c in gpu_estimate.prediction(TINY, gpu_estimate.batch_of(1, 8), n)) for n in (1, 2, 5)]
    assert all(a < b for a, b in itertools.pairwise(totals))
