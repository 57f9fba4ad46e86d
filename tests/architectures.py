"""Packed rows beside each document by itself, in small random models of all that transformers has.

python tests/architectures.py [llama gemma2 ...]      # none: all; half a minute
python tests/architectures.py --rotary llama qwen3    # which rotary types pack, up to the original length and beyond

A line for each: `equal`, `refused` (with what the run would say), `not made` (no small one could be made here), or
`DIFFERENT`; then the exit code is 1. `apart`: documents share a row; `plain`: the loss is computed from the last hidden
states (`model.has_plain_head`).
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))

import attention  # noqa: E402
import config  # noqa: E402
import model as modeling  # noqa: E402
import packing  # noqa: E402

CPU = torch.device("cpu")
SIZES = {
    64: ("vocab_size", "intermediate_size", "ffn_dim", "vocab_size_per_layer_input", "index_topk", "decoder_ffn_dim"),
    32: ("hidden_size", "d_model", "n_embd", "embed_dim"),
    16: ("sliding_window", "moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank",
         "qk_head_dim", "mamba_d_head"),
    8: ("head_dim", "rotary_dim", "state_size", "mamba_d_state", "mamba_chunk_size", "qk_rope_head_dim", "v_head_dim",
        "qk_nope_head_dim", "linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input",
        "index_head_dim"),
    4: ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads",
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "linear_num_value_heads",
        "mamba_n_heads", "laurel_rank"),
    2: ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "eos_token_id",
        "num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "num_experts_per_token", "moe_k",
        "linear_num_key_heads", "mamba_expand", "index_n_heads", "altup_num_inputs"),
    1: ("n_group", "topk_group", "num_shared_experts", "n_shared_experts", "first_k_dense_replace", "bos_token_id",
        "partial_rotary_factor"),
    0: ("pad_token_id", "num_nextn_predict_layers", "num_kv_shared_layers"),
    128: ("max_position_embeddings", "n_positions"),
    0.05: ("attn_logit_softcapping",),  # small, so that it shows
}  # fmt: skip


def small(model_type: str):
    """A configuration of two small layers, one with a window of 16 tokens where the architecture has such."""
    kind = CONFIG_MAPPING[model_type]
    whole = kind()
    if getattr(whole, "text_config", None) is not None:
        tower = getattr(whole, "vision_config", None)
        towers = {} if tower is None else {"vision_config": small_one(type(tower)).to_dict()}
        return kind(text_config=small_one(type(whole.text_config)).to_dict(), **towers)
    return small_one(kind)


def small_one(kind):
    whole = kind()
    sizes = {name: size for size, names in SIZES.items() for name in names if name in whole.to_dict()}
    if "kv_lora_rank" in sizes:
        sizes["num_key_value_heads"] = 4
    if kinds := whole.to_dict().get("layer_types"):
        sizes["layer_types"] = ([*dict.fromkeys(kinds)] * 2)[:2]  # one of each kind
    return kind(**sizes)


def documents() -> list[tuple[np.ndarray, np.ndarray]]:
    """(input_ids, labels) of four conversations."""
    generator, made = np.random.default_rng(0), []
    for length in (9, 21, 5, 13):
        ids = generator.integers(3, 64, length).astype(np.int32)
        made.append((ids, np.where(np.arange(length) < length // 2, -100, ids)))
    return made


def random_model(model_config, kernel: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config, attn_implementation=kernel, dtype=torch.float32)
    for p in model.parameters():
        if p.ndim < 2:  # biases, norms and sinks that do something
            p.data += 0.1 * torch.randn_like(p)
    return model.eval()  # no dropout, no noise in routers


def by_itself(model_config):
    """(the model, the summed loss of the documents), one at a time, as transformers computes them."""
    model, loss = random_model(model_config, "eager"), 0.0
    for ids, labels in documents():
        logits = model(torch.tensor(ids[None], dtype=torch.long), use_cache=False).logits[0]  # (tokens, vocabulary)
        loss += F.cross_entropy(logits[:-1], torch.tensor(labels[1:], dtype=torch.long), reduction="sum")
    return model, loss


def differences(model_config, **asked) -> tuple[float, float, bool, bool]:
    """(of the loss, of the gradient, apart, plain): relative, of the documents in packed rows and by themselves.
    `asked`: keys of the section `model`. Raises ValueError where the model is refused."""
    asked = config.Model(name=model_config.model_type, dtype="float32", **asked)
    model_class = modeling.model_class(asked.name, model_config)
    kernel = attention.choose(asked.attention, asked.dtype, model_class, CPU)
    model = random_model(model_config, kernel)
    model.config.use_cache = False
    model.train()
    if asked.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    apart = attention.check_packing(model, asked.name, torch.float32)
    plain = modeling.has_plain_head(model)
    model.eval()
    packed_loss = modeling.PackedLoss(model, plain)
    rows = [[0, 1, 2, 3]] if apart else [[0], [1], [2], [3]]
    packed = sum(packed_loss(packing.collate(documents(), row)) for row in rows)
    alone, separate = by_itself(model_config)
    packed.backward(), separate.backward()

    off = of = 0.0
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        a, b = (torch.zeros_like(p) if p.grad is None else p.grad for p in (ours, theirs))
        off, of = off + float((a - b).square().sum()), of + float(b.square().sum())
    return abs(packed.item() / separate.item() - 1), (off / of) ** 0.5, apart, plain


ROTARY = {  # the keys of `rope_parameters` besides its type, for an original length of 64 tokens and 8 numbers a head
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0},
    "longrope": {"factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
    "llama3": {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "proportional": {},
}


def rotary_model(model_type: str, rope_type: str):
    """A small model with these rotary embeddings, in which they show."""
    model_config = small(model_type)
    # Dynamic ones take the largest number of positions for the original length.
    model_config.max_position_embeddings = 64 if rope_type == "dynamic" else 128
    own = {} if rope_type in ("default", "dynamic", "linear") else {"original_max_position_embeddings": 64}
    model_config.rope_parameters = {"rope_type": rope_type, "rope_theta": 100.0} | own | ROTARY[rope_type]
    model_config.original_max_position_embeddings, model_config.initializer_range = 64, 0.2  # Phi-3 has its own.
    return random_model(model_config, "per_document")


def sweep(model_types: list[str]):
    for model_type in model_types:
        for rope_type in ROTARY:
            within, beyond = (
                attention.isolates_documents(rotary_model(model_type, rope_type), CPU, torch.float32, longest=longest)
                for longest in (64, 100)
            )
            print(f"{model_type:12} {rope_type:12} packs within the original length: {within}, beyond it: {beyond}")


def main(model_types: list[str]):
    counts = {"equal": 0, "DIFFERENT": 0, "refused": 0, "not made": 0}
    for model_type in model_types:
        try:
            model_config = small(model_type)
            with torch.device("meta"):
                weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(model_config).parameters())
            if weights > 5e7:
                raise ValueError(f"{weights:,} weights are too many")
            by_itself(model_config)
        except Exception as error:
            word, said = "not made", f"{type(error).__name__}: {error}"
        else:
            try:
                loss, gradient, apart, plain = differences(model_config)
                word = "equal" if loss < 1e-5 and gradient < 1e-4 else "DIFFERENT"
                said = f"loss {loss:.0e}, gradient {gradient:.0e}, apart {apart}, plain {plain}"
            except Exception as error:
                word, said = "refused", f"{type(error).__name__}: {error}"
        counts[word] += 1
        print(f"{model_type:26} {word:10} {' '.join(said.split())[:160]}", flush=True)
    print(", ".join(f"{count} {word}" for word, count in counts.items()))
    raise SystemExit(1 if counts["DIFFERENT"] else 0)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    if "--rotary" in sys.argv:
        sweep(sys.argv[2:])
        raise SystemExit
    main(sys.argv[1:] or [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES])
