"""LoRA: trained matrices of low rank beside weights that stay as they are; adapters as PEFT reads and writes them."""

import hashlib
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils.sha import sha_fileobj
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

# The keys of an adapter's configuration that are read here, or that do not change what is computed
PEFT_KEYS = (
    "peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout", "bias",
    "target_modules", "inference_mode", "init_lora_weights", "auto_mapping", "peft_version", "megatron_core",
    "qalora_group_size", "runtime_config",
)  # fmt: skip


class LoraLinear(torch.nn.Linear):
    """A linear layer whose weight stays as it is, plus a trained matrix of low rank: `x W' + scale dropout(x) A' B'`
    (Hu et al., 2021, https://arxiv.org/abs/2106.09685). lora_A (rank, in_features), lora_B (out_features, rank), zeros
    at first; float32."""

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

    def merged(self) -> torch.nn.Linear:
        linear = torch.nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = self.weight.float() + self.scale * (self.lora_B.float() @ self.lora_A.float())
        linear.weight, linear.bias = torch.nn.Parameter(weight.to(self.weight.dtype)), self.bias
        return linear


def adapter_config(model, config) -> dict:
    """What PEFT writes into adapter_config.json, for the LoRA of a `config.Model`. Raises ValueError where a target is
    no linear layer of the model. https://huggingface.co/docs/peft/package_reference/lora"""
    lora, linear = config.lora, linear_layers(model)
    names = sorted({name.rpartition(".")[2] for name in linear})
    targets = names if lora.targets == "all-linear" else lora.targets
    for target in targets:
        if not any(is_called(name, target) for name in linear):
            raise ValueError(
                f"model.lora.targets: {target!r} is no linear layer of this model that can be adapted; there are "
                f"{', '.join(names) or 'none'}"
            )
    if not targets:
        raise ValueError(f"model.lora.rank = {lora.rank}: {config.name} has no linear layers (torch.nn.Linear)")
    folder = Path(config.name)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(folder.absolute()) if folder.is_dir() else config.name,
        "revision": adapter_revision(config),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": targets,
        "bias": "none",
        "inference_mode": True,
    }


def linear_layers(model) -> dict[str, torch.nn.Linear]:
    """What can be adapted: all but the output layer, whose weight the loss takes by itself, and what computes something
    of its own beside the product (as Llama 4's router)."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and type(module).forward is torch.nn.Linear.forward
        and module is not head
    }


def is_called(name: str, target: str) -> bool:
    """Whether `target` is the full name of a module, or the last parts of it."""
    return f".{name}".endswith(f".{target}")


def add_adapter(model, adapter: dict):
    """Make `LoraLinear` of the linear layers that a PEFT configuration names; nothing else is trained."""
    model.requires_grad_(False)
    scale = adapter["lora_alpha"] / adapter["r"]
    for name, module in linear_layers(model).items():
        if any(is_called(name, target) for target in adapter["target_modules"]):
            model.set_submodule(name, LoraLinear(module, adapter["r"], scale, adapter["lora_dropout"]))
    model.adapter_config = adapter


def has_adapter(model) -> bool:
    return hasattr(model, "adapter_config")


def merge_adapter(model):
    """Add the adapter to the weights of its base, in place."""
    for name, module in [*model.named_modules()]:
        if isinstance(module, LoraLinear):
            model.set_submodule(name, module.merged())
    del model.adapter_config


def identity(config) -> str:
    """Changes when the weights that a `config.Model` names do: the Hub commit or, for a folder, a hash of its weight
    files (a second for a GB or two)."""
    folder = Path(config.name)
    if not folder.is_dir():
        return adapter_revision(config) or "unknown"
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with open(path, "rb") as file:
            digest.update(path.name.encode() + sha_fileobj(file))
    return digest.hexdigest()[:16]


def adapter_revision(config) -> str | None:
    """The Hub commit that a `config.Model` was read from, even if newer ones exist; None for a folder."""
    if Path(config.name).is_dir():
        return None
    cached = try_to_load_from_cache(config.name, "config.json", revision=config.revision)
    return Path(cached).parent.name if isinstance(cached, str) else config.revision


def open_adapter(folder: Path, dtype, attention: str | None = None, weights: dict | None = None):
    """The base that an adapter's folder names, with the adapter; `weights`: the adapter's, by name, where they are not
    to be read there. Raises ValueError where it is an adapter of another kind, or its base is gone."""
    path = folder / "adapter_config.json"
    adapter = json.loads(path.read_text(encoding="utf-8"))
    others = [key for key, value in adapter.items() if value and key not in PEFT_KEYS]
    others += ["bias"] * (adapter.get("bias", "none") != "none")
    if not isinstance(adapter.get("init_lora_weights", True), bool):
        others.append("init_lora_weights")  # such as PiSSA's, which changes the base
    if adapter.get("peft_type") != "LORA" or others or not isinstance(adapter.get("target_modules"), list):
        raise ValueError(f"{path}: only plain LoRA adapters with a list of target_modules are read here {others}")
    base, revision = adapter["base_model_name_or_path"], adapter.get("revision")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base, revision=revision, dtype=dtype, attn_implementation=attention
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: its base_model_name_or_path = {base!r} cannot be read ({' '.join(str(error).split())[:200]}); "
            "bring it back, or name where it is now"
        ) from None
    add_adapter(model, adapter)
    if weights is None:
        weights = load_file(path.with_name("adapter_model.safetensors"))
        weights = {inner_name(name): value for name, value in weights.items()}
    if weights.keys() != {name for name, p in model.named_parameters() if p.requires_grad}:
        raise ValueError(f"{path.parent} does not hold the weights of the layers that its adapter_config.json names")
    model.load_state_dict(weights, strict=False)
    if (path.parent / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path.parent)
    return model.eval()


def peft_name(name: str) -> str:
    return f"base_model.model.{name}.weight"


def inner_name(name: str) -> str:
    return name.removeprefix("base_model.model.").removesuffix(".weight")
