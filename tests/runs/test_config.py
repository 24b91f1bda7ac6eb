"""A run's configuration: options of four owners by their own names, and files that outlive the options of their day."""

import json
import shutil

import pytest
import yaml
from peft import LoraConfig
from transformers import TrainingArguments

from bloblora import runs
from bloblora.cli import main
from bloblora.methods import METHODS
from bloblora.runs.config import default_of, different, options_of
from tests.tiny_base import queries, write_jsonl, write_signed

GIVEN = {"data": "a.jsonl", "output": "run"}


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """The folder of a run with options that no file of ours names."""
    folder = tmp_path_factory.mktemp("config")
    options = {
        "use_rslora": True,
        "rank_pattern": {"v_proj": 3},
        "weight_decay": 0.25,
        "lr_scheduler_type": "cosine",
        "adam_beta2": 0.9,
    }
    config = runs.RunConfig.of(
        data=str(write_jsonl(folder / "data.jsonl", queries())),
        output=str(folder / "run"),
        model=str(base),
        steps=2,
        batch_size=2,
        r=2,
        prior_std=0.1,
        keep_checkpoints=True,
        **options,
    )
    runs.train(config, progress=False)
    return folder / "run"


def test_options_of_lora_and_the_trainer_need_no_edit(trained):
    lora = json.loads((trained / "adapter_config.json").read_text())
    assert (lora["r"], lora["use_rslora"], lora["rank_pattern"]) == (2, True, {"v_proj": 3})
    (checkpoint,) = (trained / "checkpoints").glob("checkpoint-*")
    import torch

    arguments = torch.load(checkpoint / "training_args.bin", weights_only=False)  # transformers' own file, just written
    assert (arguments.weight_decay, arguments.adam_beta2, arguments.lr_scheduler_type) == (0.25, 0.9, "cosine")


def test_each_option_has_one_owner_and_is_said(trained):
    for name in METHODS:
        sections = options_of(name)
        names = [option for options in sections.values() for option in options]
        assert len(names) == len(set(names))
        assert all(option.metadata["help"] for option in sections["method"].values())
    stored = json.loads((trained / "run.json").read_text())
    assert stored["config"]["method"] == {"name": "blob", "prior_std": 0.1, "head_prior_std": "none"}
    assert stored["config"]["lora"] == {"r": 2, "use_rslora": True, "rank_pattern": {"v_proj": 3}}
    assert stored["config"]["training"].keys() == {
        "max_steps", "per_device_train_batch_size", "learning_rate", "weight_decay", "lr_scheduler_type", "adam_beta2",
        "head",
    }  # fmt: skip
    given = yaml.safe_load((trained / "config.yaml").read_text())
    given["training"]["learning_rate"], given["method"]["head_prior_std"] = 2e-3, "none"
    given["training"]["head"] = "class_means"
    assert given | {"validation": 0.0, "temperature_scaling": False, "dtype": "float32"} == stored["config"]


@pytest.mark.parametrize("method", METHODS)
def test_help_shows_the_options_of_one_method(method, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--method", method, "--help"])
    shown = capsys.readouterr().out
    own = METHODS[method].options()
    others = {name for kind in METHODS.values() for name in kind.options()} - own.keys()
    assert all(f"--{name.replace('_', '-')}" in shown for name in own)
    assert not [name for name in others if f"--{name.replace('_', '-')} " in shown]


def test_defaults_are_their_owners():
    blob = options_of("blob")
    assert default_of(blob["lora"]["use_rslora"], "blob") == LoraConfig.use_rslora
    assert default_of(blob["training"]["adam_beta2"], "blob") == TrainingArguments.adam_beta2
    assert default_of(options_of("ivon")["training"]["learning_rate"], "ivon") == 0.03
    assert default_of(options_of("mc-dropout")["lora"]["lora_dropout"], "mc-dropout") == 0.1


def rewritten(trained, tmp_path, change):
    folder = shutil.copytree(trained, tmp_path / "run")
    stored = json.loads((folder / "run.json").read_text())
    change(stored)
    write_signed(folder / "run.json", stored)
    return folder


def test_a_run_without_a_new_option_has_its_default(trained, tmp_path):
    """As one that an earlier version wrote, before the option was there."""

    def earlier(stored):
        del stored["options"]["gamma"], stored["options"]["prior_kwargs"]

    folder = rewritten(trained, tmp_path, earlier)
    assert runs.load_run(folder).method == runs.load_run(trained).method
    config = runs.open_run(folder).config
    assert runs.train(config.with_options(output=str(folder)), progress=False).training["num_examples"] == 4


@pytest.mark.parametrize("section", ["method", "lora", "training", None, "options"])
def test_an_unknown_option_says_who_wrote_it(trained, tmp_path, section):
    def later(stored):
        stored["libraries"]["bloblora"] = "9.9"
        config = stored["config"]
        {None: config, "options": stored["options"]}.get(section, config.get(section))["jitter"] = 1

    with pytest.raises(runs.RunError, match=r"written by bloblora 9\.9, this is .*jitter"):
        runs.open_run(rewritten(trained, tmp_path, later))


def test_configurations_are_compared_by_what_was_given():
    plain = runs.RunConfig.of(**GIVEN)
    spelled = runs.RunConfig.of(**GIVEN, steps="auto", lora_alpha=16, prior_std="auto", adam_beta2=0.999, seed=0)
    assert plain.given() != spelled.given()
    assert different(plain.given(), spelled.given()) == different(spelled.given(), plain.given()) == []
    other = runs.RunConfig.of(**GIVEN, lora_alpha=8, method="ivon")
    found = different(plain.given(), other.given())
    assert found == ["method: 'blob' there, 'ivon' now", "lora_alpha: 16 there, 8 now"]


def test_sections_and_names_alone_are_the_same():
    nested = runs.RunConfig.of(
        **GIVEN, method={"name": "blob", "prior": "student_t", "prior_kwargs": {"degrees_of_freedom": 3}}, lora={"r": 4}
    )
    flat = runs.RunConfig.of(**GIVEN, prior="student_t", prior_kwargs={"degrees_of_freedom": 3}, r=4)
    assert nested == flat == runs.RunConfig(**flat.given())
    assert flat.build_method().build_prior().degrees_of_freedom == 3


def test_a_preset_gives_way_to_what_is_given():
    config = runs.RunConfig.of(**GIVEN, preset="paper", r=4, init_std=0.01)
    assert config.lora == {
        "r": 4,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj", "lm_head"],
    }
    assert config.build_method().init_std == 0.01
    assert config.build_method().estimator == "flipout"
    lora = runs.RunConfig.of(**GIVEN, preset="paper", method="lora")  # the paper's settings, without its method
    assert lora.method == {"name": "lora"}
    assert lora.training == config.training
    for name, factors in (("bbb", "AB"), ("blob-symmetric", "AB"), ("blob-b", "B")):
        assert runs.RunConfig.of(**GIVEN, preset=name).build_method().factors == factors


@pytest.mark.parametrize(("method", "norm"), [("blob", 1), ("distilled", 1), ("map", 0), ("c-lora", 0), ("lora", 1)])
def test_gradients_are_not_clipped_where_a_prior_is_in_the_loss(method, norm):
    assert runs.RunConfig.of(**GIVEN, method=method).training_options()["max_grad_norm"] == norm
    assert runs.RunConfig.of(**GIVEN, method=method, max_grad_norm=0.5).training_options()["max_grad_norm"] == 0.5


def test_another_method_leaves_the_options_of_the_old_one():
    config = runs.RunConfig.of(**GIVEN, prior_std=0.1, r=4).with_options(method="map", prior_std=0.3)
    assert (config.method, config.lora) == ({"name": "map", "prior_std": 0.3}, {"r": 4})
    assert config.with_options(steps=7).training["max_steps"] == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior_stdd": 1}, "unknown option 'prior_stdd'; did you mean 'prior_std'"),
        (
            {"method": "lora", "effective_sample_size": 1},
            "method 'lora' has no option 'effective_sample_size'; it is of ivon",
        ),
        ({"lora": {"rank": 3}}, "lora: unknown option 'rank'"),
        ({"training": {"output_dir": "x"}}, "training: unknown option 'output_dir'"),
        ({"lora": 3}, "lora: 3; it must be a mapping of names to values"),
        (
            {"prior": "student_t", "prior_kwargs": {"nu": 3}},
            "prior 'student_t' has no nu; it has num_pairs, degrees_of_freedom",
        ),
        ({"temperature_scaling": True, "validation": 0}, "there are none: give validation"),
        ({"top_blocks": 1, "layers_to_transform": [0]}, "both say which blocks are adapted"),
        ({"top_blocks": 1, "targets": ".*q_proj"}, r"target_modules '\.\*q_proj': .* with top_blocks name layers"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(runs.RunError, match=message):
        runs.RunConfig.of(**GIVEN, **options)
