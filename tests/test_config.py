from pathlib import Path

import pytest

import config

RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def load(tmp_path, text: str, *overrides: str) -> config.Config:
    (tmp_path / "c.yaml").write_text(text)
    return config.load(str(tmp_path / "c.yaml"), [*overrides])


def test_the_file_overrides_defaults_and_the_command_line_overrides_both(tmp_path):
    text = "seed: 1\ntrain: {learning_rate: 1e-5, max_steps: 3}\ndata.max_seq_length: 64\n"
    loaded = load(tmp_path, text, "seed=2", "train.max_steps=null", "logger.wandb.name=sft-dev-1-gpu")
    assert (loaded.seed, loaded.train.learning_rate, loaded.train.max_steps) == (2, 1e-5, None)
    assert (loaded.logger.wandb.name, loaded.data.max_seq_length) == ("sft-dev-1-gpu", 64)
    assert loaded.train.eps == config.Config().train.eps


@pytest.mark.parametrize(
    "text, name, value",
    [
        ("1e-5", "train.learning_rate", 1e-5),
        ("1", "train.learning_rate", 1.0),
        ("1_000", "train.max_steps", 1000),
        ("010", "seed", 10),
        ("123", "model.name", "123"),
        ("0123", "model.revision", "0123"),
        ("no", "tokenizer.name", "no"),
        ("2024-01-01", "logger.wandb.name", "2024-01-01"),
        ("'null'", "logger.wandb.name", "null"),
        ("", "train.max_steps", None),
        ("[1, 0.5]", "train.betas", [1.0, 0.5]),
        ("[q_proj, 1]", "model.lora.targets", ["q_proj", "1"]),
        ("1:02:03:04", "checkpoint.must_save_by", "1:02:03:04"),
    ],
)
def test_the_type_of_a_key_decides_how_its_value_is_read(tmp_path, text, name, value):
    for loaded in (load(tmp_path, f"{name}: {text}"), config.load(None, [f"{name}={text}"])):
        for part in name.split("."):
            loaded = getattr(loaded, part)
        assert loaded == value and type(loaded) is type(value)


def test_arguments_of_a_dataset_are_read_as_json_and_else_are_text(tmp_path):
    text = "data: {args: {a: no, b: 010, c: 1_0, d: 2024-01-01, e: 1e-5, f: 3, g: '3', h: [true, False], i: ~, j: }}"
    wanted = {"a": "no", "b": "010", "c": "1_0", "d": "2024-01-01", "e": 1e-5, "f": 3, "g": "3", "h": [True, False]}
    wanted |= {"i": None, "j": None}
    assert load(tmp_path, text).data.args == wanted
    assert load(tmp_path, text, "data.args.k=run #3", "data.args.f=4").data.args == wanted | {"k": "run #3", "f": 4}
    assert load(tmp_path, text, "data.args={z: 1}").data.args == {"z": 1}


@pytest.mark.parametrize("name", ["data.args.subset", "data.args.columns.id", "tokenizer.name"])
@pytest.mark.parametrize(
    "text", ["no", "on", "Yes", "y", "2024-01-01", "12:30", "1_000", "0x1F", ".5", "2024", "1.10", "1e5", "True"]
)
def test_a_name_that_yaml_would_read_as_something_else_stays_text(tmp_path, name, text):
    loaded = load(tmp_path, f"{name}: {text}"), config.load(None, [f"{name}={text}"])
    for value in map(config.to_dict, loaded):
        for part in name.split("."):
            value = value[part]
        assert value == text


def test_arguments_with_dots_are_those_inside_and_a_name_may_be_null(tmp_path):
    overrides = ["data.args.columns.system=null", "data.args.columns.id=~", "data.args.subset="]
    loaded = load(tmp_path, "data.args: {columns: {messages: no, id: 1}, subset: 2, n: 0.5}", *overrides)
    assert loaded.data.args == {"columns": {"messages": "no", "id": None, "system": None}, "subset": None, "n": 0.5}
    assert config.load(None, ["data.args.n=1", "data.args.n.m=2"]).data.args == {"n": {"m": 2}}


@pytest.mark.parametrize(
    "name",
    ["output_dir", "model.name", "tokenizer.name", "tokenizer.chat_template", "data.dataset", "data.args.validation"],
)
def test_a_path_may_have_a_tilde_and_variables(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/all/data")
    for text, wanted in (("~/a.jinja", "/home/me/a.jinja"), ("$DATA/${DATA}.jinja", "/all/data//all/data.jinja")):
        for loaded in (load(tmp_path, f"{name}: {text}"), config.load(None, [f"{name}={text}"])):
            plain = config.to_dict(loaded)
            for part in name.split("."):
                plain = plain[part]
            assert plain == wanted
    with pytest.raises(ValueError, match=rf"{name} = \$NOWHERE/a.jinja: .*NOWHERE"):
        load(tmp_path, f"{name}: $NOWHERE/a.jinja")


def test_what_is_no_path_keeps_its_dollars_and_tildes(monkeypatch):
    monkeypatch.setenv("DATA", "/data")
    template = "{% set DATA = '~/$DATA' %}{{ DATA }}"
    loaded = config.load(None, [f'tokenizer.chat_template="{template}"', "data.args={sign: $DATA, home: ~/a}"])
    assert (loaded.tokenizer.chat_template, loaded.data.args) == (template, {"sign": "$DATA", "home": "~/a"})
    mixture = "[{dataset: $DATA/a.jsonl, args: {validation: $DATA/b.jsonl, sign: $DATA}}]"
    args = {"validation": "/data/b.jsonl", "sign": "$DATA"}
    assert config.load(None, [f"data.dataset={mixture}"]).data.dataset == [{"dataset": "/data/a.jsonl", "args": args}]


@pytest.mark.parametrize("value", ["0.1", "'1e5'", "'12'", "[a, {b: 'null'}]"])
def test_the_resolved_configuration_is_a_file_that_loads_to_itself(tmp_path, value):
    names = ["data.args.subset=1.10", "data.args.columns.id=7", "model.name='7'", "tokenizer.name='null'"]
    loaded = config.load(None, [f"data.args.a={value}", "checkpoint.must_save_by=00:03:45:00", *names])
    assert load(tmp_path, config.dump(loaded)) == loaded and loaded.tokenizer.name == "null"


@pytest.mark.parametrize(
    "override, named",
    [
        ("train.learning_rat=1", "'train.learning_rate'"),
        ("train.lr=1", "'train.learning_rate'"),
        ("learning_rate=1", "'train.learning_rate'"),
        ("train..learning_rate=1", "'train.learning_rate'"),
        ("modle={name: a}", "'model.name'"),
        ("model.lora={rnak: 1}", "'model.lora.rank'"),
        ("model=3", "model.name"),
        ("policy={train_global_batch_size: 8}", "policy.train_global_batch_size is train.global_batch_size here"),
        ("policy.optimizer.kwargs={lr: 1}", "policy.optimizer.kwargs.lr is train.learning_rate here"),
        ("policy.tokenizer.name=a", "'tokenizer.name'"),
        ("seed=a", "seed = 'a' must be int"),
        ("seed=true", "seed = 'true' must be int"),
        ("seed=1.5", "seed = '1.5' must be int"),
        ("output_dir=", "output_dir = '' must be str"),
        ("train.learning_rate=.nan", "train.learning_rate"),
        ("train.clip_grad_norm=inf", "train.clip_grad_norm"),
        ("train.betas=[1, a]", "train.betas = ['1', 'a'] must be list of float"),
        ("train.schedule=cosin", "train.schedule = 'cosin' must be constant | linear | cosine"),
        ("train.max_steps=0", "train.max_steps = 0 must be at least 1"),
        ("train.clip_grad_norm=0", "train.clip_grad_norm = 0 must be"),
        ("train.betas=[1", "train.betas=[1"),
        ("seed", "seed=VALUE"),
        ("train.min_learning_rate=1e-6", "train.min_learning_rate needs train.schedule"),
        ("checkpoint.must_save_by=1:30", "checkpoint.must_save_by = 1:30 must be DD:HH:MM:SS"),
        ("parallel.replicas=2", "parallel.strategy=fsdp"),
        ("model={from_scratch: true, lora: {rank: 4}}", "model.from_scratch=false"),
        ("data.dataset=[]", "data.dataset"),
        ("data.dataset=[squad]", "data.dataset"),
        ("data.dataset=[{args: {}}]", "must hold dataset"),
        ("data.dataset=[{dataset: 2024}]", "must hold dataset"),
        ("data.dataset=[{dataset: squad, wieght: 2}]", "'wieght'"),
        ("data.dataset=[{dataset: squad, weight: -1}]", "'weight': -1"),
        ("data.dataset=[{dataset: squad, weight: '2'}]", "'weight': '2'"),
        ("data={dataset: [{dataset: squad}], args: {a: 1}}", "data.args"),
        ("train.profile=[3, 2]", "train.profile = [3, 2] must be [first, last]"),
        ("tokenizer.date=tomorrow", "tokenizer.date = tomorrow must be YYYY-MM-DD"),
        ("train={max_steps: null, max_epochs: null}", "set one of them"),
    ],
)
def test_a_mistake_is_one_line_with_the_key_and_the_rule(override, named):
    with pytest.raises(ValueError) as caught:
        config.load(None, ["model.dtype=float32", override])
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, named",
    [
        ("seed: 1\nseed: 2", "seed"),
        ("data: {args: {a: 1, a: 1}}", "duplicate key a"),
        ("train: {max_steps: 1}\ntrain.max_steps: 2", "train.max_steps"),
        ("train:\n  max_step: 3", "'train.max_steps'"),
        ("model:\n", "model.name"),
        ("- seed", "keys and values"),
        ("a: b: c", "line 1, column 5"),
    ],
)
def test_a_mistake_in_a_file_names_the_file_and_the_key(tmp_path, text, named):
    with pytest.raises(ValueError, match=f"c.yaml: .*{named}"):
        load(tmp_path, text)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["train.max_steps"], "write train.max_steps=VALUE"),
        (["nowhere.yaml"], "nowhere.yaml"),
        (["a.yaml", "b.yaml"], "a.yaml b.yaml"),
        (["--fast"], "--fast"),
        (["seed=1", "--config"], "--config"),
    ],
)
def test_a_mistake_on_the_command_line_is_an_error(arguments, named):
    with pytest.raises(ValueError, match=named):
        config.from_command_line(arguments)


@pytest.mark.parametrize("arguments", [["{}", "seed=3"], ["seed=3", "--config", "{}"], ["--config={}", "seed=3"]])
def test_the_configuration_file_may_stand_anywhere(tmp_path, arguments):
    (tmp_path / "a=b.yaml").write_text("output_dir: here")
    (tmp_path / "c.yaml").write_text("output_dir: here")
    path = tmp_path / ("a=b.yaml" if arguments[0] == "--config={}" else "c.yaml")
    loaded = config.from_command_line([argument.format(path) for argument in arguments])
    assert (loaded.output_dir, loaded.seed) == ("here", 3)


def test_what_nemo_rl_keys_are_called_here_is_a_key():
    assert {*config.NEMO_RL.values()} <= config.KEYS.keys()


def test_help_lists_every_key_with_its_type_and_default():
    lines = config.describe().split("\n")
    assert "  train.max_steps: int | null = 60" in lines
    assert '  model.lora.targets: all-linear | list of str = "all-linear"' in lines
    assert len(lines) == 2 * len(config.KEYS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_each_recipe_loads_and_has_a_folder_of_its_own(path):
    recipe = config.load(str(path), [])
    assert sum(config.load(str(other), []).output_dir == recipe.output_dir for other in RECIPES) == 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_the_first_lines_of_a_recipe_have_the_command_that_starts_it(path):
    comments = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert f"configs/{path.name}" in comments


@pytest.mark.parametrize(
    "file, overrides, limits",
    [
        ("seed: 1", [], (1, 60)),
        ("train: {max_epochs: 3}", [], (3, None)),
        ("train: {max_steps: 500}", [], (None, 500)),
        ("train.max_steps: 500", ["train.max_epochs=3"], (3, 500)),
        ("train: {max_steps: null}", [], (1, None)),
        ("train: {max_epochs: null}", [], (None, 60)),
        ("seed: 1", ["train.max_epochs=3", "train.max_epochs=4"], (4, None)),
    ],
)
def test_of_steps_and_epochs_the_one_that_is_named_holds(tmp_path, file, overrides, limits):
    loaded = load(tmp_path, file, *overrides)
    assert (loaded.train.max_epochs, loaded.train.max_steps) == limits
    assert load(tmp_path, config.dump(loaded)) == loaded
