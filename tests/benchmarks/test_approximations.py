"""The fast version of the benchmark of cheaper predictions: that it runs, and that what is exact agrees."""

import json
import sys

import approximations
import pytest


@pytest.mark.parametrize("seeds", ["1", pytest.param("01", marks=pytest.mark.long)])
def test_what_is_exact_agrees(base, tmp_path, monkeypatch, seeds):
    options = ["--steps", "2", "--limit", "2", "--test-limit", "1", "--outside-limit", "6", "--seeds", *seeds]
    folders = ["--model", str(base), "--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["approximations.py", *options, *folders])
    monkeypatch.setattr(approximations, "ALONE", 2)
    approximations.main()
    file = tmp_path / "runs" / "seed1.json"
    result = json.loads(file.read_text())
    del result["variants"][approximations.MIRRORED_STOP]
    file.write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--missing"])
    approximations.main()
    for seed in seeds:
        variants = json.loads((tmp_path / "runs" / f"seed{seed}.json").read_text())["variants"]
        reference, exact = (variants[name] for name in (approximations.REFERENCE, approximations.EXACT))
        assert exact["scores"]["nll"] == pytest.approx(reference["scores"]["nll"], abs=1e-5)
        assert reference["metrics"]["draws"] == 10
        assert all(variants[name]["metrics"]["draws"] < 10 for name in approximations.RULES)
        assert variants[approximations.MIRRORED_STOP]["metrics"]["draws"] <= 4
        public = json.loads((tmp_path / "results.json").read_text())[f"seed {seed}"]["variants"]
        assert public[approximations.EXACT].keys() == exact.keys() - {"scores"}
        assert public[approximations.EXACT]["metrics"]["nll"] == pytest.approx(exact["metrics"]["nll"], rel=1e-4)
    assert "| linearized, two passes |" in (tmp_path / "README.md").read_text()
