import pytest
from transformers import HfArgumentParser

from bloblora import BlobTrainingArguments

from .conftest import arguments


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kl_weighting", "linear"),
        ("optimizer_style", "both"),
        ("kl_scale", -0.1),
        ("kl_scale", float("nan")),
        ("kl_scale", "much"),
        ("kl_learning_rate", float("inf")),
        ("std_learning_rate", 0),
        ("num_weight_draws", 0),
        ("num_weight_draws", 1.5),
        ("eval_num_samples", -1),
        ("gamma", 0),
        ("dataset_size", 0),
    ],
)
def test_a_bad_value_is_named(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*{value!r}"):
        arguments(tmp_path, **{name: value})


def test_edges_are_allowed(tmp_path):
    edges = dict(kl_scale=0, kl_learning_rate=0.0, num_weight_draws=1, eval_num_samples=0, dataset_size=1)
    assert vars(arguments(tmp_path, **edges)).items() >= edges.items()


def test_the_parser_of_scripts_reads_them(tmp_path):
    parser = HfArgumentParser(BlobTrainingArguments)
    given = ["--output_dir", str(tmp_path), "--kl_scale", "0.3", "--optimizer_style", "paper"]
    (found,) = parser.parse_args_into_dataclasses(given)
    assert (found.kl_scale, found.head_kl_scale, found.std_learning_rate, found.optimizer_style) == (
        *(0.3, "auto", "auto"),
        "paper",
    )
    assert "`auto`: D / 240" in " ".join(parser.format_help().split())
