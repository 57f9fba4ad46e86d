from pathlib import Path

import pytest

import config

RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def test_the_file_then_the_command_line_decide(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("seed: 1\ntrain: {learning_rate: 1e-5, max_steps: 3}\n")
    loaded = config.load(str(path), ["seed=2", "train.max_steps=null", "logger.wandb.name=sft-dev-1-gpu"])
    assert (loaded.seed, loaded.train.learning_rate, loaded.train.max_steps) == (2, 1e-5, None)
    assert loaded.logger.wandb.name == "sft-dev-1-gpu"


def test_the_resolved_configuration_is_a_file_that_loads_to_itself(tmp_path):
    loaded = config.load(None, ["data.args.validation=0.1", "checkpoint.must_save_by=00:03:45:00", "seed=7"])
    (tmp_path / "c.yaml").write_text(config.dump(loaded))
    assert config.load(str(tmp_path / "c.yaml"), []) == loaded


@pytest.mark.parametrize(
    "override, said",
    [
        ("train.learning_rat=1", "nearest is 'train.learning_rate'"),
        ("seed=a", "must be a whole number"),
        ("seed=true", "must be a whole number"),
        ("train.schedule=cosin", "did you mean cosine"),
        ("train.max_steps=0", "at least 1"),
        ("train.betas=[1]", "two numbers"),
        ("model=3", "is a section"),
        ("seed", "KEY=VALUE"),
        ("train..learning_rate=1", "KEY=VALUE"),
        ("train.min_learning_rate=1e-6", "needs train.schedule=linear or cosine"),
        ("model={name: configs, revision: main}", "model.revision = 'main' is of a model on the Hub"),
        ("train.clip_grad_norm=0", "null switches"),
        ("parallel.replicas=2", "parallel.replicas needs parallel.strategy=fsdp, not auto"),
    ],
)
def test_a_mistake_names_the_key_and_the_mend(override, said):
    with pytest.raises(ValueError, match=said):
        config.load(None, [override])


@pytest.mark.parametrize(
    "entries, reason",
    [
        ("[]", "nothing to train on"),
        ("[{args: {}}]", r"data.dataset\[0\] = .* must be"),
        ("[{dataset: squad, wieght: 2}]", r"data.dataset\[0\]: there is no key 'wieght'; the nearest is 'weight'"),
        ("[{dataset: squad, weight: -1}]", r"data.dataset\[0\].weight = -1 must be at least 0"),
        ("[{dataset: squad, weight: '2'}]", r"data.dataset\[0\].weight = '2' must be a number"),
        ("[{dataset: squad, weight: 0}]", "nothing to train on"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_with_the_entry_and_the_rule(entries, reason):
    with pytest.raises(ValueError, match=reason):
        config.load(None, [f"data.dataset={entries}"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_each_recipe_is_a_configuration_that_says_how_it_is_started_and_goes_to_a_folder_of_its_own(path):
    recipe = config.load(str(path), [])
    comments = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert f"configs/{path.name}" in comments and any(word in comments for word in ("val/loss", "GiB"))
    assert sum(config.load(str(other), []).output_dir == recipe.output_dir for other in RECIPES) == 1


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["data.dataset={}", "output_dir={}/out"], "lies in data.dataset"),
        (["output_dir={}/file"], "is a file; name a folder"),
        (["seed=9223372036854775808"], "must be below 2.63"),
    ],
)
def test_an_output_dir_or_a_seed_that_would_fail_later_is_an_error(tmp_path, overrides, said):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=said):
        config.load(None, [override.format(tmp_path) for override in overrides])
