"""Every configuration key with its default; a YAML file, then dotted overrides; anything unknown is an error."""

import dataclasses
import difflib
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path

import yaml


def key(default, help, choices=None, minimum=None):
    """A dataclass field with its one line of help, and what it may be."""
    metadata = {"help": help, "choices": choices, "minimum": minimum}
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(cls):
    return dataclasses.field(default_factory=cls)


@dataclass
class Lora:
    rank: int = key(0, "0: all weights are trained", minimum=0)
    alpha: float = key(16.0, "the adapter is scaled by alpha / rank")
    dropout: float = key(0.0, "dropout before the adapter", minimum=0)
    targets: str | list = key(
        "all-linear", "all-linear: all but the output layer; or a list of module names, as [q_proj, v_proj]"
    )
    base_dtype: str | None = key(
        None, "of the frozen weights; null: model.dtype", choices=[None, "bfloat16", "float32"]
    )
    merge: bool = key(False, "true: the final model/ has the adapter added to its weights; false: it is a PEFT adapter")


@dataclass
class Model:
    name: str = key("meta-llama/Llama-3.2-1B", "Hub id or folder")
    from_scratch: bool = key(False, "true: random weights, built from its config.json")
    revision: str | None = key(None, "branch, tag or commit on the Hub")
    dtype: str = key(
        "bfloat16",
        "of forward and backward; weights, reductions and optimizer state are float32",
        choices=["bfloat16", "float32"],
    )
    attention: str = key(
        "auto",
        "auto: varlen on CUDA in bfloat16, else sdpa, called per document; eager: as transformers computes it",
        choices=["auto", "varlen", "sdpa", "eager"],
    )
    compile: bool = key(False, "torch.compile each block")
    activation_checkpointing: bool = key(False, "recompute activations in the backward pass: less memory, slower")
    lora: Lora = section(Lora)


@dataclass
class Tokenizer:
    name: str | None = key(None, "null: the model's")
    chat_template: str | None = key(
        None, "Jinja text or the path of a .jinja file; null: the dataset's custom_template, else the tokenizer's"
    )


@dataclass
class Data:
    dataset: str | list = key(
        "squad",
        "squad | openassistant | my_data.py:MyDataset | a file, glob or folder of chats | a Hub id | a mixture: a list "
        "of {dataset: ..., args: {...}, weight: 1}, weight: passes over it in an epoch",
    )
    args: dict = key({}, "keyword arguments of that dataset class")
    max_seq_length: int = key(1024, "tokens; a longer conversation is overlong", minimum=2)
    overlong: str = key("drop", "what happens to a longer conversation", choices=["drop", "truncate", "error"])
    train_on: str = key(
        "all", 'assistant turns that are trained; "train": false in a message is always obeyed', choices=["all", "last"]
    )


@dataclass
class Train:
    global_batch_size: int = key(32, "conversations per optimizer step, over all ranks", minimum=1)
    max_tokens_per_micro_batch: int = key(
        8192, "tokens that a rank computes at once; changes memory and speed, never the result", minimum=1
    )
    max_epochs: int = key(1, "passes over the training split", minimum=1)
    max_steps: int | None = key(60, "null: as many as the epochs have", minimum=1)
    learning_rate: float = key(5.0e-6, "the peak, reached after warmup_steps", minimum=0)
    schedule: str = key("constant", "after warmup_steps", choices=["constant", "linear", "cosine"])
    warmup_steps: int = key(0, "steps of linear warm-up", minimum=0)
    min_learning_rate: float = key(0.0, "where linear and cosine end", minimum=0)
    weight_decay: float = key(0.1, "AdamW's; not applied to norms and biases", minimum=0)
    betas: list[float] = key([0.9, 0.98], "AdamW's")
    eps: float = key(1.0e-5, "AdamW's", minimum=0)
    clip_grad_norm: float | None = key(1.0, "null: no clipping", minimum=0)


@dataclass
class Validation:
    every: int | None = key(10, "steps between validations; null: never", minimum=1)
    at_start: bool = key(True, "validate before the first step too")
    max_examples: int | None = key(256, "of each dataset, the same ones each time; null: all", minimum=1)
    samples: int = key(2, "prompts (of each dataset) whose answers are printed at each validation", minimum=0)
    exact_match: int = key(
        0,
        "conversations (of each dataset) whose last turn is answered greedily and scored, before and after training",
        minimum=0,
    )


@dataclass
class Parallel:
    strategy: str = key("auto", "auto: ddp where weights and optimizer fit, else fsdp", choices=["auto", "ddp", "fsdp"])
    replicas: int = key(1, "with fsdp: groups that each hold the whole model (hybrid sharding)", minimum=1)
    context: int = key(1, "ranks that share a row, so that each computes a part of a long conversation", minimum=1)
    cpu_offload: bool = key(False, "with fsdp on GPUs: weights and optimizer state in the machine's memory")


@dataclass
class Checkpoint:
    every: int | None = key(10, "steps between checkpoints; null: only at the end", minimum=1)
    keep: int = key(3, "how many of the best by validation loss to keep, besides the newest", minimum=0)
    async_save: bool = key(True, "write in the background while training goes on")
    must_save_by: str | None = key(None, "DD:HH:MM:SS after the start: save, stop, exit 0")
    resume: str = key("auto", "auto: go on from the newest whole checkpoint in output_dir", choices=["auto", "never"])


@dataclass
class Tensorboard:
    enabled: bool = key(True, "write output_dir/tensorboard")


@dataclass
class Wandb:
    enabled: bool = key(False, "log to Weights & Biases; needs `pip install wandb` and a login")
    project: str = key("sft", "its project")
    name: str | None = key(None, "the run's name there")


@dataclass
class Logger:
    tensorboard: Tensorboard = section(Tensorboard)
    wandb: Wandb = section(Wandb)


@dataclass
class Cluster:
    num_nodes: int | None = key(None, "null: as many as torchrun started; any other number is an error", minimum=1)
    gpus_per_node: int | None = key(
        None, "processes per machine; without torchrun, that many are started through its launcher", minimum=1
    )
    hang_timeout: float = key(600.0, "seconds without progress before the run ends and names the hung rank", minimum=1)


@dataclass
class Config:
    seed: int = key(42, "for data order, dropout and random weights; below 2^63", minimum=0)
    output_dir: str = key("results/squad", "folder for everything that a run leaves")
    model: Model = section(Model)
    tokenizer: Tokenizer = section(Tokenizer)
    data: Data = section(Data)
    train: Train = section(Train)
    validation: Validation = section(Validation)
    parallel: Parallel = section(Parallel)
    checkpoint: Checkpoint = section(Checkpoint)
    logger: Logger = section(Logger)
    cluster: Cluster = section(Cluster)


def load(path: str | None, overrides: list[str]) -> Config:
    """Defaults, then the YAML file at `path` (None: no file), then `KEY=VALUE` overrides, each read as YAML.

    Raises ValueError, one line that names the file or override, the key, the rule and the mend.
    """
    config = Config()
    if path is not None:
        try:
            tree = yaml.load(Path(path).read_text(encoding="utf-8"), YamlLoader)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"{path}: is not YAML: {yaml_reason(error)}") from None
        if tree is not None and not isinstance(tree, dict):
            raise ValueError(f"{path}: must hold keys and values, as `seed: 42`, not {type(tree).__name__}")
        set_values(config, tree or {}, f"{path}: ")
    for override in overrides:
        name, equals, text = override.partition("=")
        parts = name.split(".")
        if not equals or not all(parts):
            raise ValueError(f"{override!r} is not an override: write KEY=VALUE, such as train.learning_rate=1e-5")
        try:
            value = yaml.load(text, YamlLoader)
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"{override!r}: the value is not YAML: {yaml_reason(error)}") from None
        tree = Raw(value, text)
        for part in reversed(parts):
            tree = {part: tree}
        set_values(config, tree, "command line: ")
    check(config)
    return config


def from_command_line(arguments: list[str]) -> Config:
    """[CONFIG.yaml | --config CONFIG.yaml] [KEY=VALUE ...]; no file: configs/squad.yaml. Raises ValueError."""
    paths, overrides, arguments = [], [], list(arguments)
    while arguments:
        argument = arguments.pop(0)
        if argument == "--config" and arguments:
            paths.append(arguments.pop(0))
        elif argument.startswith("--config="):
            paths.append(argument.partition("=")[2])
        elif argument.startswith("-"):
            raise ValueError(f"there is no flag {argument!r}; keys are given as KEY=VALUE, and --help lists them")
        elif "=" in argument:
            overrides.append(argument)
        else:
            paths.append(argument)
    if len(paths) > 1:
        raise ValueError(f"one configuration file, not {len(paths)} ({', '.join(paths)})")
    return load(paths[0] if paths else str(Path(__file__).parent / "configs/squad.yaml"), overrides)


class Raw(typing.NamedTuple):
    """A value from the command line with the text it came from: `model.name=123` is a name, not a number."""

    value: object
    text: str


def set_values(target, tree: dict, where: str, prefix: str = ""):
    """Write the values of a nested dict into a dataclass, checking names and types."""
    hints = typing.get_type_hints(type(target))
    fields = {field.name: field for field in dataclasses.fields(target)}
    for name, value in tree.items():
        full_name = f"{prefix}{name}"
        if name not in fields:
            raise ValueError(f"{where}there is no key {full_name!r}; the nearest is {nearest(full_name)!r}")
        current, hint = getattr(target, name), hints[name]
        plain = value.value if isinstance(value, Raw) else value
        if dataclasses.is_dataclass(current):
            if not isinstance(plain, dict):
                keys = ", ".join(field.name for field in dataclasses.fields(current))
                raise ValueError(f"{where}{full_name} is a section, not a value ({plain!r}); its keys are {keys}")
            set_values(current, plain, where, full_name + ".")
        elif hint is dict and isinstance(value, dict) and where.startswith("command line"):
            merge(current, value)  # data.args.validation=0.1 adds to what the file says
        else:
            setattr(target, name, convert(value, hint, fields[name].metadata, f"{where}{full_name}"))


def merge(target: dict, tree: dict):
    for name, value in tree.items():
        if isinstance(value, dict):
            target[name] = target[name] if isinstance(target.get(name), dict) else {}
            merge(target[name], value)
        else:
            target[name] = value.value if isinstance(value, Raw) else value


TYPES = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list",
    list[float]: "a list of numbers", dict: "keys and values", type(None): "null",
}  # fmt: skip


def convert(value, hint, metadata, where: str):
    """`value` as the type `hint`; an int is taken for a float; otherwise the types must match."""
    allowed = hint.__args__ if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, Raw):
        value = value.text if str in allowed and not isinstance(value.value, (str, type(None), list)) else value.value
    if float in allowed and type(value) is int:
        value = float(value)
    if list[float] in allowed and isinstance(value, list) and all(type(item) in (int, float) for item in value):
        return [float(item) for item in value]
    if type(value) not in allowed:
        raise ValueError(f"{where} = {value!r} must be {' or '.join(TYPES[t] for t in allowed)}")
    if metadata["choices"] and value not in metadata["choices"]:
        near = difflib.get_close_matches(str(value), [choice for choice in metadata["choices"] if choice], 1)
        hint_text = f"; did you mean {near[0]}?" if near else ""
        choices = ", ".join("null" if choice is None else choice for choice in metadata["choices"])
        raise ValueError(f"{where} = {value!r} must be one of {choices}{hint_text}")
    if type(value) is float and not abs(value) < float("inf"):
        raise ValueError(f"{where} = {value!r} must be a finite number")
    if metadata["minimum"] is not None and type(value) in (int, float) and value < metadata["minimum"]:
        raise ValueError(f"{where} = {value!r} must be at least {metadata['minimum']}")
    return value


def check(config: Config):
    """Rules over more than one key, and keys whose values are not implemented."""
    train, checkpoint = config.train, config.checkpoint
    if config.seed >= 2**63:
        raise ValueError(f"seed = {config.seed} must be below 2^63")
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        raise ValueError(f"train.betas = {train.betas} must be two numbers, at least 0 and below 1, as [0.9, 0.98]")
    if train.clip_grad_norm == 0:
        raise ValueError("train.clip_grad_norm = 0 would stop all learning; null switches clipping off")
    if train.min_learning_rate > train.learning_rate:
        raise ValueError(
            f"train.min_learning_rate = {train.min_learning_rate} must not exceed learning_rate = {train.learning_rate}"
        )
    if train.min_learning_rate and train.schedule == "constant":
        raise ValueError(
            f"train.min_learning_rate = {train.min_learning_rate} needs train.schedule=linear or cosine; constant ends "
            "where it began"
        )
    if checkpoint.must_save_by is not None and not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", checkpoint.must_save_by):
        raise ValueError(f"checkpoint.must_save_by = {checkpoint.must_save_by!r} must be DD:HH:MM:SS, as 00:03:45:00")
    if config.validation.exact_match and not config.validation.every:
        raise ValueError("validation.exact_match needs validation.every: there is no validation to score answers in")
    if config.model.revision and Path(config.model.name).is_dir():
        raise ValueError(
            f"model.revision = {config.model.revision!r} is of a model on the Hub, and model.name = "
            f"{config.model.name!r} is a folder; leave it out"
        )
    check_mixture(config.data)
    check_output_dir(config.output_dir, config.data.dataset)
    check_lora(config.model)
    if config.parallel.context > 1 and config.model.attention == "eager":
        raise ValueError("parallel.context > 1 needs model.attention=auto, sdpa or varlen, not eager")
    for name, asked in [("replicas", config.parallel.replicas > 1), ("cpu_offload", config.parallel.cpu_offload)]:
        if asked and config.parallel.strategy != "fsdp":
            raise ValueError(f"parallel.{name} needs parallel.strategy=fsdp, not {config.parallel.strategy}")


def check_output_dir(output_dir: str, dataset: str | list):
    if not output_dir:
        raise ValueError("output_dir is empty; name a folder")
    if Path(output_dir).is_file():
        raise ValueError(f"output_dir = {output_dir!r} is a file; name a folder")
    for name in [entry["dataset"] for entry in dataset] if isinstance(dataset, list) else [dataset]:
        if Path(name).is_dir() and Path(output_dir).resolve().is_relative_to(Path(name).resolve()):
            raise ValueError(
                f"output_dir = {output_dir!r} lies in data.dataset = {name!r}, whose files are all read as chats; name "
                "a folder outside"
            )


def check_lora(model: Model):
    lora = model.lora
    if not lora.rank:
        return
    if model.from_scratch:
        raise ValueError("model.lora.rank > 0 needs trained weights below it: set model.from_scratch=false")
    if not lora.alpha > 0:
        raise ValueError(f"model.lora.alpha = {lora.alpha} must be above 0: it scales the adapter")
    if lora.dropout >= 1:
        raise ValueError(f"model.lora.dropout = {lora.dropout} must be below 1")
    if lora.base_dtype == "bfloat16" and model.dtype == "float32":
        raise ValueError("model.lora.base_dtype=bfloat16 needs model.dtype=bfloat16")
    if not (lora.targets == "all-linear" or isinstance(lora.targets, list) and lora.targets):
        raise ValueError(f"model.lora.targets = {lora.targets!r} must be all-linear or a list of module names")


def check_mixture(data: Data):
    """The entries of a list in data.dataset."""
    if isinstance(data.dataset, str):
        return
    if data.args:
        raise ValueError("data.args belongs to one dataset; in a list of them each entry has its own args")
    kinds = {"dataset": (str, "a name"), "args": (dict, "keys and values"), "weight": ((int, float), "a number")}
    for i, entry in enumerate(data.dataset):
        where = f"data.dataset[{i}]"
        if not isinstance(entry, dict) or "dataset" not in entry:
            raise ValueError(f"{where} = {entry!r} must be {{dataset: NAME, args: {{...}}, weight: 1}}")
        for name, value in entry.items():
            if name not in kinds:
                close = difflib.get_close_matches(str(name), kinds, 1, 0.0)[0]
                raise ValueError(f"{where}: there is no key {name!r}; the nearest is {close!r}")
            kind, described = kinds[name]
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{where}.{name} = {value!r} must be {described}")
        if not 0 <= entry.get("weight", 1) < float("inf"):
            raise ValueError(f"{where}.weight = {entry['weight']!r} must be at least 0 (0: only for validation)")
    if not any(entry.get("weight", 1) for entry in data.dataset):
        raise ValueError(f"data.dataset = {data.dataset} has nothing to train on; give an entry a weight above 0")


def leaves(cls=Config, prefix=""):
    """(dotted name, type, field) of every key."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from leaves(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", hints[field.name], field


def nearest(name: str) -> str:
    """The key that was most likely meant: one with this last part, one of the same section, then any."""
    names = [full_name for full_name, _, _ in leaves()]
    section, _, last = name.rpartition(".")
    sections = sorted({known.rpartition(".")[0] for known in names} - {""})
    exact = [known for known in names if known.rpartition(".")[2] == last]
    if exact:
        return exact[0]
    if section in sections:
        inside = [known for known in names if known.rpartition(".")[0] == section]
        initials = [known for known in inside if "".join(w[0] for w in known.rpartition(".")[2].split("_")) == last]
        return (initials or difflib.get_close_matches(name, inside, 1, 0.0))[0]
    if not section and difflib.get_close_matches(name, sections, 1, 0.6):
        return difflib.get_close_matches(name, sections, 1, 0.6)[0]
    by_last = {full_name.rsplit(".", 1)[-1]: full_name for full_name in names}
    close = difflib.get_close_matches(name, names, 1, 0.6)
    if close:
        return close[0]
    last = difflib.get_close_matches(name.rsplit(".", 1)[-1], by_last, 1, 0.0)
    return by_last[last[0]]


def describe() -> str:
    """One line per key: name, type, default and help."""
    lines = []
    for name, hint, field in leaves():
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        choices = [choice or "null" for choice in field.metadata["choices"] or []]
        kind = " | ".join(choices) or type_name(hint)
        shown = yaml.safe_dump(default, default_flow_style=True).replace("\n...\n", "").strip()
        lines.append(f"  {name}: {kind} = {shown}\n      {field.metadata['help']}")
    return "\n".join(lines)


def type_name(hint) -> str:
    return getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint).replace("None", "null")


def to_dict(config: Config) -> dict:
    return dataclasses.asdict(config)


def dump(config: Config) -> str:
    """YAML that `load` reads back to the same configuration."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


class YamlLoader(yaml.SafeLoader):
    """YAML where `1e-5` is a number, `1:30:00` and dates are text, and a key that is there twice is an error."""

    def construct_mapping(self, node, deep=False):
        names = []
        for key_node, _ in node.value:
            name = self.construct_object(key_node, deep=True)
            if name in names:
                raise yaml.MarkedYAMLError(problem=f"the key {name!r} is there twice", problem_mark=key_node.start_mark)
            names.append(name)
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node):
        return int(node.value)  # PyYAML reads 010 as 8


def yaml_reason(error: Exception) -> str:
    """What is wrong, and in which line and column."""
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}" if mark else " ".join(str(error).split())


YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.rsplit(":", 1)[-1] not in ("int", "float", "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
YamlLoader.add_constructor("tag:yaml.org,2002:int", YamlLoader.construct_decimal)
YamlLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+" r"$"), list("-+0123456789"))
YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)
