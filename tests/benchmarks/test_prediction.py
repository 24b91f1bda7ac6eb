"""The fast versions of the prediction benchmarks: that their answers agree, not their times."""

import json
import sys

import prediction
import prediction_peers


def test_all_ways_to_predict_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prediction.py", "--smoke", "--results", str(tmp_path)])
    monkeypatch.setattr(prediction, "SHAPES", ((1, 16), (4, 16)))
    prediction.main()
    cases = json.loads((tmp_path / "results.json").read_text())["cases"]
    assert len(cases) == 4
    for case in cases.values():
        assert max(case["differences"].values()) < 1e-5
        assert case["flops"] > 0
    # with adapters in the last of four blocks the other three are computed once, not ten times
    assert cases["4 × 16, top quarter"]["flops"] < 0.5 * cases["4 × 16, all layers"]["flops"]
    assert "| 4 × 16, top quarter |" in (tmp_path / "README.md").read_text()


def test_peers_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prediction_peers.py", "--smoke", "--results", str(tmp_path)])
    monkeypatch.setattr(prediction_peers, "SHAPES", ((1, 16), (2, 16)))
    prediction_peers.main()
    cases = json.loads((tmp_path / "results.json").read_text())["cases"]
    for case in cases.values():
        assert {prediction_peers.LAPLACE_TORCH, prediction_peers.LINEARIZED} <= case["seconds"].keys()
    assert prediction_peers.BAYESIAN_LORA in cases["2 × 16"]["seconds"]
