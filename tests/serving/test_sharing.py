"""Base weights that runs have in common are in memory once, and each run answers as it does by itself."""

import copy

import pytest
import torch

from bloblora import runs
from bloblora.serving.hosted import share_weights
from tests.serving.test_predict import RECORDS


def storages(*models):
    return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()}


def test_runs_share_all_of_the_base_and_nothing_of_the_adapters(hosted):
    """Of a run of the same labels, one of three labels, and one without a head."""
    first = hosted["desk"].run.model
    named = {name.replace(".base_layer", ""): p for name, p in first.named_parameters()}
    base = {name: p for name, p in named.items() if "lora" not in name and "blob" not in name}
    for name in ("lora", "three", "quiz"):
        other = {n.replace(".base_layer", ""): p for n, p in hosted[name].run.model.named_parameters()}
        shared = {n for n, p in other.items() if n in base and p is base[n]}
        assert shared == {n for n in base if "score" not in n}
        assert hosted[name].shared_parameters == sum(base[n].numel() for n in shared)
    models = [one.run.model for one in hosted.values()]
    apart = sum(sum(storages(model).values()) for model in models)
    assert sum(storages(*models).values()) == apart - 4 * sum(one.shared_parameters for one in hosted.values())
    assert hosted["desk"].shared_parameters == 0


def test_tied_weights_stay_tied(hosted):
    model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embedding"].weight
    other, pool = copy.deepcopy(model), {}
    assert share_weights(model, pool) == 0
    assert share_weights(other, pool) == 15
    assert other["head"].weight is other["embedding"].weight is model["embedding"].weight


@pytest.mark.parametrize("method", ["ensemble", "mc-dropout", "laplace-lora", "full"])
def test_every_method_answers_as_by_itself(folders, base, tmp_path, method):
    """Also those that exchange weights or adapters to draw; and what full fine-tuning changed isn't shared."""
    data = runs.load_run(folders["desk"]).config.data
    options = {"data": data, "model": str(base), "steps": 3, "batch_size": 2, "learning_rate": 0.01, "r": 2}
    runs.train(runs.RunConfig.of(output=str(tmp_path / "run"), method=method, **options))
    expected = [runs.load_run(folder).predict(RECORDS["desk"], 3) for folder in (tmp_path / "run", folders["desk"])]
    run, desk, pool = runs.load_run(tmp_path / "run"), runs.load_run(folders["desk"]), {}
    size = sum(p.numel() for n, p in desk.model.named_parameters() if "lora" not in n and "blob" not in n)
    assert share_weights(desk.model, pool) == 0
    shared = share_weights(run.model, pool)
    assert shared < 0.1 * size if method == "full" else shared > 0.9 * size
    for one, prediction in zip((run, desk, run), [*expected, expected[0]], strict=True):
        found = one.predict(RECORDS["desk"], 3).probabilities
        torch.testing.assert_close(found, prediction.probabilities)
