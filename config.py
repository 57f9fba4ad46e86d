"""Every configuration key with its default; a YAML file, then dotted overrides; anything unknown is an error."""

import contextlib
import copy
import dataclasses
import difflib
import functools
import importlib.util
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml


def key(default, help: str, minimum: float | None = None):
    """A key with its line of help and its smallest value; its annotation says what else it may be."""
    return field(default_factory=lambda: copy.copy(default), metadata={"help": help, "minimum": minimum})


@dataclass
class Lora:
    rank: int = key(0, "0: all parameters are trained", 0)
    alpha: float = key(16.0, "the adapter is scaled by alpha / rank", 1e-9)
    dropout: float = key(0.0, "dropout before the adapter", 0)
    targets: Literal["all-linear"] | list[str] = key("all-linear", "all-linear: all but the output layer")
    base: Literal["bfloat16", "float32", "nf4"] | None = key(None, "of what is frozen; nf4: 4 bits; null: model.dtype")
    train_embeddings: bool = key(False, "also train the input embedding and the output layer, fully")
    merge: bool = key(False, "true: model/ is a plain model with the adapter added; false: a PEFT adapter")


@dataclass
class Model:
    name: str = key("meta-llama/Llama-3.2-1B", "Hub id, folder, or the output_dir of another run")
    from_scratch: bool = key(False, "true: random parameters, built from its config.json")
    revision: str | None = key(None, "branch, tag or commit on the Hub")
    dtype: Literal["bfloat16", "float32"] = key("bfloat16", "of forward and backward; parameters are float32")
    attention: Literal["auto", "varlen", "sdpa", "eager"] = key("auto", "auto: varlen on GPUs, else sdpa")
    compile: bool | None = key(None, "torch.compile each block; null: with attention varlen, on a GPU")
    activation_checkpointing: bool = key(False, "recompute activations in the backward pass: less memory, slower")
    lora: Lora = field(default_factory=Lora)


@dataclass
class Tokenizer:
    name: str | None = key(None, "null: the model's")
    chat_template: str | None = key(None, "Jinja or a .jinja file; tokenizer: its own; null: the dataset's, else that")
    template_arguments: dict = key({}, "extra variables for the template, as {enable_thinking: false}")
    add_tokens: list[str] = key([], "special tokens to add, with rows of the embedding where there are none")
    date: str | None = key(None, "that the template prints, YYYY-MM-DD; null: of the run's first launch")


@dataclass
class Data:
    dataset: str | list[dict] = key("squad", "squad | openassistant | my.py:Class | files | Hub id | [{dataset, ...}]")
    args: dict = key({}, "keyword arguments of that dataset class")
    cache: str | None = key(None, "folder of the tokens; null: sft-tokens below HF_HOME")
    max_seq_length: int = key(1024, "tokens; a longer conversation is overlong", 2)
    overlong: Literal["drop", "truncate", "error"] = key("drop", "what happens to a longer conversation")
    train_on: Literal["all", "last"] = key("all", 'assistant turns; a message\'s own "train": false is always kept')


@dataclass
class Train:
    global_batch_size: int = key(32, "conversations per optimizer step, over all ranks", 1)
    max_tokens_per_micro_batch: int = key(8192, "how much a rank computes at once; never changes the result", 1)
    max_epochs: int | None = key(1, "passes over the training split; null: as many as max_steps need", 1)
    max_steps: int | None = key(60, "null: as many as the epochs have", 1)
    optimizer: Literal["adamw", "adamw_8bit"] = key("adamw", "adamw_8bit: moments in 8 bits, needs bitsandbytes")
    learning_rate: float = key(5.0e-6, "the peak, reached after warmup_steps", 0)
    schedule: Literal["constant", "linear", "cosine"] = key("constant", "after warmup_steps")
    warmup_steps: int = key(0, "steps of linear warmup", 0)
    min_learning_rate: float = key(0.0, "where linear and cosine end", 0)
    weight_decay: float = key(0.1, "AdamW's; not applied to norms and biases", 0)
    betas: list[float] = key([0.9, 0.98], "AdamW's")
    eps: float = key(1.0e-5, "AdamW's", 0)
    clip_grad_norm: float | None = key(1.0, "null: no clipping", 1e-9)
    profile: list[int] | None = key(None, "[first, last] step of a profiler trace, output_dir/profile.json")


@dataclass
class Validation:
    every: int | None = key(10, "steps between validations; null: never", 1)
    at_start: bool = key(True, "validate before the first step too")
    max_examples: int | None = key(256, "of each dataset, the same ones each time; null: all", 1)
    samples: int = key(2, "prompts of each dataset whose answers are printed at each validation", 0)
    exact_match: int = key(0, "conversations of each dataset answered and scored before and after", 0)
    patience: int | None = key(None, "validations without a better val/loss that end the run; null: none do", 1)


@dataclass
class Parallel:
    strategy: Literal["auto", "ddp", "fsdp"] = key("auto", "auto: ddp where model and optimizer fit, else fsdp")
    replicas: int = key(1, "with fsdp: groups that each hold the whole model (hybrid sharding)", 1)
    context: int = key(1, "ranks that share one long sequence", 1)
    cpu_offload: bool = key(False, "with fsdp on GPUs: parameters and optimizer state in CPU memory")


@dataclass
class Checkpoint:
    every: int | None = key(10, "steps between checkpoints; null: only at the end", 1)
    keep: int = key(3, "how many of the best by validation loss to keep, besides the newest", 0)
    final: Literal["last", "best"] = key("last", "the checkpoint that becomes model/; best: by val/loss")
    async_save: bool = key(True, "write in the background while training continues")
    must_save_by: str | None = key(None, "DD:HH:MM:SS after the start: save, stop, exit 0")
    resume: Literal["auto", "never"] = key("auto", "auto: resume from the newest complete checkpoint in output_dir")


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
    tensorboard: Tensorboard = field(default_factory=Tensorboard)
    wandb: Wandb = field(default_factory=Wandb)


@dataclass
class Cluster:
    num_nodes: int | None = key(None, "null: as many as torchrun started; any other number is an error", 1)
    gpus_per_node: int | None = key(None, "ranks per node; without torchrun, its launcher starts that many", 1)
    hang_timeout: float = key(600.0, "seconds without progress after which the run ends", 1)


@dataclass
class Config:
    seed: int = key(42, "of data order, dropout and random parameters", 0)
    output_dir: str = key("results/squad", "folder for everything that a run leaves")
    model: Model = field(default_factory=Model)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    validation: Validation = field(default_factory=Validation)
    parallel: Parallel = field(default_factory=Parallel)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    logger: Logger = field(default_factory=Logger)
    cluster: Cluster = field(default_factory=Cluster)


def list_keys(cls, prefix: str = ""):
    for member in dataclasses.fields(cls):
        name, is_section = prefix + member.name, dataclasses.is_dataclass(member.type)
        yield from list_keys(member.type, f"{name}.") if is_section else [(name, member)]


KEYS = dict(list_keys(Config))  # The field of every key, by its dotted name.
# What keys of NeMo-RL's sft.yaml are called here, by the last part of their names; docs/moving.md has more.
NEMO_RL = dict(pair.split("=") for pair in """max_num_epochs=train.max_epochs max_num_steps=train.max_steps seed=seed
lr=train.learning_rate weight_decay=train.weight_decay betas=train.betas eps=train.eps precision=model.dtype
train_global_batch_size=train.global_batch_size train_mb_tokens=train.max_tokens_per_micro_batch model_name=model.name
max_total_sequence_length=data.max_seq_length max_grad_norm=train.clip_grad_norm val_period=validation.every
checkpoint_dir=output_dir save_period=checkpoint.every keep_top_k=checkpoint.keep context_parallel_size=parallel.context
chat_template=tokenizer.chat_template checkpoint_must_save_by=checkpoint.must_save_by""".split())  # fmt: skip


def load(path: str | None, overrides: list[str]) -> Config:
    """Defaults, then the YAML file, then `KEY=VALUE` overrides. ValueError: one line with the key, value and rule."""
    config, where, named = Config(), path, set()
    try:
        if path is not None:
            tree = yaml.load(Path(path).read_text(encoding="utf-8"), Loader) or {}
            if not isinstance(tree, dict):
                raise ValueError("must hold keys and values, as `seed: 42`")
            set_values(config, tree, named)
        for where in overrides:
            name, equals, text = where.partition("=")
            if not equals:
                raise ValueError(f"write {name}=VALUE")
            value = yaml.load(text, Loader)
            unquoted = not isinstance(value, dict | list | Quoted)
            # All of an unquoted text counts: "run #3" is a name, although YAML begins a comment at the #
            named |= set_values(config, {name: text.strip() if unquoted else value}, set())
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None
    if "train.max_epochs" not in named and "train.max_steps" in named and config.train.max_steps:
        config.train.max_epochs = None  # of the two limits the one that is named holds
    if "train.max_steps" not in named and "train.max_epochs" in named and config.train.max_epochs:
        config.train.max_steps = None
    check(config)
    return config


def from_command_line(arguments: list[str]) -> Config:
    """[CONFIG.yaml | --config CONFIG.yaml] [KEY=VALUE ...]; no file: configs/squad.yaml. Raises ValueError."""
    overrides = [item for item in arguments if ("=" in item or item in KEYS) and not item.startswith("--config=")]
    paths = [item.removeprefix("--config=") for item in arguments if item not in [*overrides, "--config"]]
    if len(paths) > 1 or "--config" in arguments[-1:] or "".join(paths).startswith("-"):
        raise ValueError(f"{' '.join(arguments)}: name one configuration file, and keys as KEY=VALUE; see --help")
    return load(paths[0] if paths else str(Path(__file__).parent / "configs/squad.yaml"), overrides)


class Quoted(str):
    """A scalar in quotes, which is text whatever it looks like."""


class Loader(yaml.BaseLoader):
    """YAML whose scalars stay text: by YAML's own rules 1e-5 would be text, 010 would be 8 and `no` would be false."""

    def construct_scalar(self, node):
        return Quoted(node.value) if node.style else node.value

    def construct_mapping(self, node, deep=False):
        mapping, names = super().construct_mapping(node, deep), [name.value for name, _ in node.value]
        if len(mapping) < len(names):
            raise ValueError(f"duplicate key {max(names, key=names.count)}")
        return mapping


def set_values(config: Config, tree: dict, names: set[str], prefix: str = "") -> set[str]:
    """Set the keys of a section from what `Loader` reads. Returns `names`, those that the same file sets, with them."""
    for name, value in tree.items():
        name = prefix + name  # "train" and then "learning_rate", or "train.learning_rate" at once
        if name in names:
            raise ValueError(f"duplicate key {name}")
        names.add(name)
        if name.startswith("data.args."):  # the other arguments stay
            *sections, last = name.removeprefix("data.args.").split(".")
            arguments = config.data.args
            for section in sections:  # as in data.args.columns.messages
                there = arguments.get(section)
                arguments[section] = arguments = {**there} if isinstance(there, dict) else {}
            arguments[last] = convert(expand(value, name), Any)
        elif name in KEYS:
            kind, minimum = KEYS[name].type, KEYS[name].metadata["minimum"]
            value = expand(value, name)
            try:
                converted = convert(value, kind)
            except ValueError:
                raise ValueError(f"{name} = {value!r} must be {describe_type(kind)}") from None
            if minimum is not None and converted is not None and converted < minimum:
                raise ValueError(f"{name} = {value} must be at least {minimum} ({KEYS[name].metadata['help']})")
            *sections, last = name.split(".")
            setattr(functools.reduce(getattr, sections, config), last, converted)
        elif name.startswith(("policy.", "sft.", "checkpointing.")) and (last := name.rpartition(".")[2]) in NEMO_RL:
            raise ValueError(f"{name} is {NEMO_RL[last]} here")
        elif isinstance(value, dict):
            set_values(config, value, names, f"{name}.")
        elif inside := [key for key in KEYS if key.startswith(f"{name}.")]:
            raise ValueError(f"{name} = {value!r} is a section; its keys are {', '.join(inside)}")
        else:  # train.lr is like train.learning_rate
            known = {alias: key for key in KEYS for alias in (re.sub("([a-z])[a-z]*(_|$)", r"\1", key), key)}
            nearest = known[difflib.get_close_matches(name, known, 1, 0.0)[0]]
            raise ValueError(f"there is no key {name!r}; the nearest is {nearest!r}")
    return names


def expand(value, name: str):
    """Replaces, in what `Loader` reads, the `~` and the $VARIABLES of paths; arguments that are names become text."""
    if isinstance(value, list):
        return [expand(item, name) for item in value]
    if isinstance(value, dict):
        return {key: expand(item, f"{name}.{key}") for key, item in value.items()}
    if type(value) is str and value.lower() in ("", "~", "null"):
        return value
    if name.startswith("data.") and (name.endswith((".subset", ".format")) or ".columns." in name):
        return Quoted(value)  # the subset 1.10 is not 1.1
    is_path = name.endswith(("output_dir", "data.cache", "model.name", "tokenizer.name", ".dataset", ".validation"))
    if not is_path and not (name.endswith(".chat_template") and value.endswith(".jinja")):
        return value
    expanded = os.path.expanduser(os.path.expandvars(value))
    if unset := re.search(r"\$\{?(\w+)", expanded):
        raise ValueError(f"{name} = {value}: the environment variable {unset[1]} is not set")
    return expanded


def convert(value, kind):
    """What `Loader` reads as the type `kind`, or ValueError. Any is for the dataset's own: JSON's values, else text."""
    origin, arguments, unquoted = get_origin(kind), get_args(kind), type(value) is str
    if unquoted and kind is Any:
        with contextlib.suppress(ValueError):
            return None if value in ("", "~") else json.loads(value.lower())
    if isinstance(value, dict) and kind in (dict, Any):
        return {str(name): convert(item, Any) for name, item in value.items()}
    if isinstance(value, list) and (origin is list or kind is Any):
        return [convert(item, *arguments or [Any]) for item in value]
    if unquoted and value.lower() in ("", "~", "null"):
        if kind is type(None):
            return None
    elif isinstance(value, str):
        if kind in (str, Any) or origin is Literal and value in arguments:
            return str(value)
        if kind is bool and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if kind in (int, float) and abs(kind(value)) < float("inf"):
            return kind(value)
    for option in () if origin in (list, Literal) else arguments:  # of a union
        with contextlib.suppress(ValueError):
            return convert(value, option)
    raise ValueError


def check(config: Config):
    """Rules over more than one key. Raises ValueError."""
    if config.train.min_learning_rate and config.train.schedule == "constant":
        raise ValueError("train.min_learning_rate needs train.schedule=linear or cosine")
    if not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", config.checkpoint.must_save_by or "00:00:00:00"):
        raise ValueError(f"checkpoint.must_save_by = {config.checkpoint.must_save_by} must be DD:HH:MM:SS")
    if not re.fullmatch(r"\d{4}-[01]\d-[0-3]\d", config.tokenizer.date or "2026-01-31"):
        raise ValueError(f"tokenizer.date = {config.tokenizer.date} must be YYYY-MM-DD")
    if config.train.max_steps is None and config.train.max_epochs is None:
        raise ValueError("train.max_steps and train.max_epochs are both null: set one of them")
    if (config.validation.exact_match or config.validation.patience) and not config.validation.every:
        raise ValueError("set validation.every, or validation.exact_match=0 and validation.patience=null")
    if config.checkpoint.final == "best" and not (config.checkpoint.keep and config.validation.every):
        raise ValueError("checkpoint.final=best needs validation.every and a checkpoint.keep of at least 1")
    if (profile := config.train.profile) and not (len(profile) == 2 and 0 < profile[0] <= profile[1]):
        raise ValueError(f"train.profile = {profile} must be [first, last], two steps")
    if config.model.lora.rank and config.model.from_scratch:
        raise ValueError("model.lora.rank > 0 needs trained parameters below it: set model.from_scratch=false")
    if config.parallel.strategy != "fsdp" and (config.parallel.replicas > 1 or config.parallel.cpu_offload):
        raise ValueError("parallel.replicas > 1 and parallel.cpu_offload need parallel.strategy=fsdp")
    settings = {f"model.lora.base={config.model.lora.base}", f"train.optimizer={config.train.optimizer}"}
    for setting in settings & {"model.lora.base=nf4", "train.optimizer=adamw_8bit"}:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(f"{setting} needs `pip install bitsandbytes`")
        if config.parallel.strategy == "fsdp":
            raise ValueError(f"{setting} cannot be sharded: set parallel.strategy=ddp")
        config.parallel.strategy = "ddp"
    if isinstance(config.data.dataset, list):
        if not any(entry.get("weight", 1) for entry in config.data.dataset):
            raise ValueError("data.dataset: no entry has a weight above 0, so there is nothing to train on")
        for entry in config.data.dataset:
            known = isinstance(entry.get("dataset"), str) and entry.keys() <= {"dataset", "args", "weight"}
            if not known or not isinstance(entry.get("weight", 1), int | float) or entry.get("weight", 1) < 0:
                raise ValueError(f"data.dataset: {entry} must hold dataset, and may hold args and weight (at least 0)")
        if config.data.args:
            raise ValueError("data.args belongs to one dataset; in a list each entry has its own args")


def describe_type(kind) -> str:
    """As "int | null" or "auto | ddp | fsdp"."""
    names = [argument if isinstance(argument, str) else describe_type(argument) for argument in get_args(kind)]
    if get_origin(kind) is list:
        return f"list of {names[0]}"
    return " | ".join(names) or kind.__name__.replace("NoneType", "null")


def describe() -> str:
    """One line per key with its type and default, and one of help."""
    return "\n".join(
        f"  {name}: {describe_type(key.type)} = {json.dumps(key.default_factory())}\n      {key.metadata['help']}"
        for name, key in KEYS.items()
    )


to_dict = dataclasses.asdict  # (config) -> nested dict of plain values
Dumper = type("Dumper", (yaml.SafeDumper,), {})  # with quotes around text such as 1e5, a number to `convert`
Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"-?[0-9.]+[eE][-+]?[0-9]+$"), list("-0123456789"))


def dump(config: Config) -> str:
    """YAML that `load` reads back to the same configuration."""
    return yaml.dump(to_dict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True)
