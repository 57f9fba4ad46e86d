"""LoRA: trained matrices of low rank beside frozen parameters; adapters in PEFT's format."""

import dataclasses
import functools
import json
import math
import operator
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

# The keys of an adapter_config.json that are read here, or that do not change what is computed.
PEFT_KEYS = """peft_type task_type base_model_name_or_path revision r lora_alpha lora_dropout bias target_modules
inference_mode init_lora_weights auto_mapping peft_version megatron_core qalora_group_size runtime_config
modules_to_save""".split()


class FrozenLinear(torch.nn.Linear):
    """A linear layer whose weight is not trained; `quantize` has it hold the weight in 4 bits."""

    product = None

    def forward(self, x):  # (..., in_features)
        return self.product(x, self.weight.t(), bias=self.bias) if self.product else super().forward(x)


class LoraLinear(FrozenLinear):
    """A linear layer whose weight is frozen, plus a trained product of low rank: `x W' + scale dropout(x) A' B'`.
    lora_A (rank, in_features), lora_B (out_features, rank), zero at first; float32. https://arxiv.org/abs/2106.09685"""

    def __init__(self, linear: torch.nn.Linear, rank: int, scale: float, dropout: float):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias, self.scale = linear.weight, linear.bias, scale
        self.dropout = torch.nn.Dropout(dropout)
        options = {"device": linear.weight.device, "dtype": torch.float32}
        self.lora_A = torch.nn.Parameter(torch.empty(rank, linear.in_features, **options))
        self.lora_B = torch.nn.Parameter(torch.zeros(linear.out_features, rank, **options))
        torch.nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):  # (..., in_features)
        low = self.scale * F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (..., rank)
        return super().forward(x) + F.linear(low, self.lora_B.to(x.dtype))  # (..., out_features)


def adapter_config(model, model_cfg) -> dict:
    """Return what PEFT writes into adapter_config.json, for the LoRA of a `config.Model`. Raises ValueError where a
    target is no linear layer of the model. https://huggingface.co/docs/peft/package_reference/lora"""
    lora, linear, name, revision = model_cfg.lora, linear_layers(model), model_cfg.name, model_cfg.revision
    names = sorted({layer.rpartition(".")[2] for layer in linear})
    targets = names if lora.targets == "all-linear" else lora.targets
    unknown = [target for target in targets if not any(f".{layer}".endswith(f".{target}") for layer in linear)]
    if unknown or not targets:
        there = ", ".join(names) or "none"
        raise ValueError(f"model.lora.targets: {unknown or lora.targets} name no linear layer; the model has {there}")
    if Path(name).is_dir():
        name, revision = str(Path(name).absolute()), None
    elif cached := try_to_load_from_cache(name, "config.json", revision=revision):
        revision = Path(cached).parent.name  # the commit on the Hub, which stays when newer ones exist
    adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True}
    adapter |= {"base_model_name_or_path": name, "revision": revision, "target_modules": targets}
    adapter |= {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    return adapter | {"modules_to_save": [*embeddings(model)] if lora.train_embeddings else None}


def linear_layers(model) -> dict[str, torch.nn.Linear]:
    """Return the layers that can be adapted: not the output layer, whose weight the loss takes by itself, and none that
    computes something of its own beside the product (as Llama 4's router)."""
    head, plain = model.get_output_embeddings(), torch.nn.Linear.forward
    return {n: module for n, module in model.named_modules() if type(module).forward is plain and module is not head}


def embeddings(model) -> dict[str, torch.nn.Module]:
    """Return the input embedding and the output layer, by the last part of their names."""
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    return {name.rpartition(".")[2]: module for name, module in model.named_modules() if module in layers}


def add_adapter(model, adapter: dict):
    """Replace the linear layers that a PEFT configuration names by `LoraLinear`; besides, only the embeddings are
    trained, if it names them. Raises ValueError where other modules are to be trained."""
    model.requires_grad_(False)
    scale = adapter["lora_alpha"] / adapter["r"]
    targets = tuple(f".{target}" for target in adapter["target_modules"])  # each a name, or the last parts of names
    for name, module in linear_layers(model).items():
        if f".{name}".endswith(targets):
            model.set_submodule(name, LoraLinear(module, adapter["r"], scale, adapter["lora_dropout"]))
    if (names := adapter.get("modules_to_save")) and {*names} != {*embeddings(model)}:
        raise ValueError(f"adapter_config.json: modules_to_save = {names} must be {[*embeddings(model)]} or null")
    for layer in embeddings(model).values() if names else ():
        layer.float().requires_grad_(True)
    model.adapter_config = adapter


def quantize(model, device: torch.device):
    """Store the weights of all frozen linear layers on the device in NF4: 4 bits per weight, and a scale of 8 bits per
    64 weights. The products are in the dtype of their inputs (QLoRA: https://arxiv.org/abs/2305.14314)."""
    from bitsandbytes import functional, matmul_4bit

    for layer in linear_layers(model).values():
        layer.__class__ = FrozenLinear  # with the same attributes
    for layer in [module for module in model.modules() if isinstance(module, FrozenLinear)]:
        weight, state = functional.quantize_4bit(layer.weight.to(device), quant_type="nf4", compress_statistics=True)
        layer.product = functools.partial(matmul_4bit, quant_state=state)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)


def count(p: torch.nn.Parameter) -> int:
    """Return how many weights a parameter holds: in NF4, two in a byte."""
    return p.numel() * (2 if p.dtype == torch.uint8 else 1)


def merge_adapter(model):
    """Add the adapter to the parameters of its base, in place."""
    for name, module in [*model.named_modules()]:
        if isinstance(module, LoraLinear):
            linear = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            weight = module.weight.float() + module.scale * (module.lora_B.float() @ module.lora_A.float())
            linear.weight, linear.bias = torch.nn.Parameter(weight.to(module.weight.dtype)), module.bias
            model.set_submodule(name, linear)
    del model.adapter_config


def read_adapter(folder: Path) -> dict:
    """Return the configuration of an adapter's folder. Raises ValueError where it is an adapter of another kind."""
    adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    plain = {"peft_type": ["LORA"], "bias": ["none"], "init_lora_weights": [True, False]}  # PiSSA's changes the base
    others = [key for key, values in plain.items() if adapter.get(key, values[0]) not in values]
    others += [key for key, value in adapter.items() if value and key not in PEFT_KEYS]
    if not isinstance(adapter["target_modules"], list):
        others.append("target_modules")
    if others:
        raise ValueError(f"{folder}/adapter_config.json: only plain LoRA with a list of target_modules, not {others}")
    return adapter


def settings_of(model_cfg):
    """Return the `config.Model` of an adapter's folder as one of its base. Raises ValueError if settings differ."""
    adapter = read_adapter(Path(model_cfg.name))
    settings = {"rank": adapter["r"], "alpha": adapter["lora_alpha"], "dropout": adapter["lora_dropout"]}
    settings |= {"targets": adapter["target_modules"], "train_embeddings": bool(adapter.get("modules_to_save"))}
    base = {"name": adapter["base_model_name_or_path"], "revision": adapter.get("revision"), "from_scratch": False}
    there = dataclasses.replace(model_cfg, **base, lora=dataclasses.replace(model_cfg.lora, **settings))
    for key in ("lora.rank", "lora.alpha", "lora.dropout", "lora.targets", "lora.train_embeddings", "from_scratch"):
        default, ours, its = map(operator.attrgetter(key), (type(model_cfg)(), model_cfg, there))
        if ours not in (default, its):
            raise ValueError(f"model.{key} = {ours}, but the adapter {model_cfg.name} has {its}: leave the key out")
    return there


def peft_parameters(model, params: dict) -> dict:
    """Return an adapter's parameters by PEFT's names; tied ones twice, because PEFT unties them."""
    trained = {p: params[name] for name, p in model.named_parameters() if p.requires_grad}
    names = {p: name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}  # the last ones
    params = params | {name: trained[p].clone() for p, name in names.items() if name not in params}
    return {re.sub("(lora_[AB])$", r"\1.weight", f"base_model.model.{name}"): p for name, p in params.items()}


def load_adapter(model, folder: Path, params: dict | None = None):
    """Read an adapter's parameters into a model that has been given its layers, and more rows of the embedding where
    the adapter has them. `params`: by name; None: those in the folder."""
    if params is None:
        saved = load_file(folder / "adapter_model.safetensors")
        params = {re.sub(r"^base_model\.model\.|(?<=lora_[AB])\.weight$", "", name): p for name, p in saved.items()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    with_tied = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    if not {*trained} <= params.keys() <= with_tied:
        raise ValueError(f"{folder} does not hold the parameters of the layers that its adapter_config.json names")
    if rows := [len(params[name]) for name in trained if "lora_" not in name]:
        model.resize_token_embeddings(rows[0], mean_resizing=False)
    if model.device.type == "meta":
        return
    model.load_state_dict(params, strict=False)
    loaded = model.state_dict()
    if not all(torch.equal(loaded[name], p.to(loaded[name].dtype)) for name, p in params.items()):
        raise ValueError(f"{folder} has an embedding and an output layer that differ: in its base they are tied")


def open_adapter(folder: Path, dtype, attention: str | None = None, params: dict | None = None):
    """Return the base that an adapter's folder names, with the adapter, for answering. `params`: see `load_adapter`."""
    adapter = read_adapter(folder)
    options = {"revision": adapter.get("revision"), "dtype": dtype, "attn_implementation": attention}
    model = AutoModelForCausalLM.from_pretrained(adapter["base_model_name_or_path"], **options)
    add_adapter(model, adapter)
    load_adapter(model, folder, params)
    for layer in embeddings(model).values():
        layer.to(model.config.dtype)  # They were trained in float32.
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()
