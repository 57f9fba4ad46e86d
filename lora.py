"""LoRA: trained matrices of low rank beside frozen parameters; adapters in PEFT's format."""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

# The keys of an adapter_config.json that are read here, or that do not change what is computed.
PEFT_KEYS = (
    "peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout", "bias",
    "target_modules", "inference_mode", "init_lora_weights", "auto_mapping", "peft_version", "megatron_core",
    "qalora_group_size", "runtime_config",
)  # fmt: skip


class LoraLinear(torch.nn.Linear):
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
    unknown = [target for target in targets if not any(is_target(layer, [target]) for layer in linear)]
    if unknown:
        raise ValueError(f"model.lora.targets: {unknown} name no linear layer of this model; it has {', '.join(names)}")
    if Path(name).is_dir():
        name = str(Path(name).absolute())
    elif cached := try_to_load_from_cache(name, "config.json", revision=revision):
        revision = Path(cached).parent.name  # the commit on the Hub, which stays when newer ones exist
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": targets,
        "bias": "none",
        "inference_mode": True,
    }


def linear_layers(model) -> dict[str, torch.nn.Linear]:
    """Return what can be adapted: all linear layers but the output layer, whose weight the loss takes by itself, and
    those that compute something of their own beside the product (as Llama 4's router)."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).forward is torch.nn.Linear.forward and module is not model.get_output_embeddings()
    }


def is_target(name: str, targets: list[str]) -> bool:
    """Return whether a target is the full name of a module, or the last parts of it."""
    return any(f".{name}".endswith(f".{target}") for target in targets)


def add_adapter(model, adapter: dict):
    """Replace the linear layers that a PEFT configuration names by `LoraLinear`; nothing else is trained."""
    model.requires_grad_(False)
    scale = adapter["lora_alpha"] / adapter["r"]
    for name, module in linear_layers(model).items():
        if is_target(name, adapter["target_modules"]):
            model.set_submodule(name, LoraLinear(module, adapter["r"], scale, adapter["lora_dropout"]))
    model.adapter_config = adapter


def merge_adapter(model):
    """Add the adapter to the parameters of its base, in place."""
    for name, module in [*model.named_modules()]:
        if isinstance(module, LoraLinear):
            linear = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            weight = module.weight.float() + module.scale * (module.lora_B.float() @ module.lora_A.float())
            linear.weight, linear.bias = torch.nn.Parameter(weight.to(module.weight.dtype)), module.bias
            model.set_submodule(name, linear)
    del model.adapter_config


def open_adapter(folder: Path, dtype, attention: str | None = None, params: dict | None = None):
    """Return the base that an adapter's folder names, with the adapter, for answering. `params`: the adapter's, by
    name; None: those in the folder. Raises ValueError where it is an adapter of another kind."""
    adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    plain = {
        "peft_type": adapter["peft_type"] == "LORA",
        "bias": adapter.get("bias", "none") == "none",
        "target_modules": isinstance(adapter["target_modules"], list),
        "init_lora_weights": isinstance(adapter.get("init_lora_weights", True), bool),  # PiSSA's changes the base
    }
    plain |= {key: not value for key, value in adapter.items() if key not in PEFT_KEYS}
    if others := [key for key, is_plain in plain.items() if not is_plain]:
        raise ValueError(f"{folder}/adapter_config.json: only plain LoRA with a list of target_modules, not {others}")
    options = {"revision": adapter.get("revision"), "dtype": dtype, "attn_implementation": attention}
    model = AutoModelForCausalLM.from_pretrained(adapter["base_model_name_or_path"], **options)
    add_adapter(model, adapter)
    if params is None:
        saved = load_file(folder / "adapter_model.safetensors")
        params = {name.removeprefix("base_model.model.").removesuffix(".weight"): p for name, p in saved.items()}
    if params.keys() != {name for name, p in model.named_parameters() if p.requires_grad}:
        raise ValueError(f"{folder} does not hold the parameters of the layers that its adapter_config.json names")
    model.load_state_dict(params, strict=False)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()
