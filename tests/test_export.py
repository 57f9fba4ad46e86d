"""Exports: tried before training, opened by transformers 4.57 as by 5; models whose files do not fit are refused."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from running import run
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DeepseekV3Config,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3NextConfig,
)
from transformers import AutoModelForCausalLM as Auto

import config
import export
from model import load_model

SIZES = {"vocab_size": 1024, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
GEMMA = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}}
GEMMA |= {"sliding_attention": {"rope_type": "default", "rope_theta": 7e3}}
MODELS = {
    "llama": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "qwen3": Qwen3Config(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "smollm2": LlamaConfig(
        **SIZES, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e5}
    ),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=16, rope_parameters=GEMMA),
}
OPEN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
opened = []
for folder in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    chat = [{"role": "user", "content": "Where is  Paris?"}, {"role": "assistant", "content": "In France."}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    ids = tokenizer(text).input_ids
    special = sorted(map(str, tokenizer.all_special_tokens))
    opened.append((text, ids, special, model(torch.tensor([(ids * 40)[:300]])).logits.detach()))
torch.save(opened, sys.argv[1])
"""


def a_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained("configs/quickstart")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|tool|>"]})
    return tokenizer


def exported(name, folder):
    torch.manual_seed(0)
    model = Auto.from_config(MODELS[name], dtype=torch.float32)
    meta = export.meta_model(model.config, model.generation_config, torch.float32)
    export.export(meta, dict(model.named_parameters()), a_tokenizer(), [3], folder)
    return folder


def test_an_exported_model_stops_where_its_base_stopped_too(tmp_path):
    model = Auto.from_config(MODELS["llama"], dtype=torch.float32)
    call, end, text = (a_tokenizer().convert_tokens_to_ids(token) for token in ("<|tool|>", "<|im_end|>", "a"))
    for own, wanted in (([call, end], [end, call]), (call, [end, call]), (end, end), ([text, end], end)):
        model.generation_config.eos_token_id = own
        meta = export.meta_model(model.config, model.generation_config, torch.float32)
        export.export(meta, dict(model.named_parameters()), a_tokenizer(), [end], tmp_path / "model")
        assert GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id == wanted


@pytest.mark.parametrize("name", MODELS)
def test_an_export_has_the_older_names_and_opens_equal(tmp_path, name):
    folder = exported(name, tmp_path / "model")
    saved, told = (json.loads((folder / f"{n}.json").read_text()) for n in ("config", "tokenizer_config"))
    rope = MODELS[name].rope_parameters
    rope = rope.get("full_attention", rope)
    assert saved["torch_dtype"] == saved["dtype"] == "float32" and saved["rope_theta"] == rope["rope_theta"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    assert saved["rope_scaling"] == (None if name in ("qwen3", "smollm2") else scaling)
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast" and "<|tool|>" in told["additional_special_tokens"]
    assert not {"is_local", "local_files_only", "name_or_path", "extra_special_tokens"} & told.keys()
    assert AutoConfig.from_pretrained(folder).rope_parameters == MODELS[name].rope_parameters
    assert AutoTokenizer.from_pretrained(folder).all_special_tokens == a_tokenizer().all_special_tokens


def test_a_rope_that_transformers_4_cannot_express_is_left_alone():
    assert export.older_rope({"rope_type": "proportional", "rope_theta": 1e4}) == {}
    nested = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": dict(LLAMA3)}
    assert export.older_rope(nested) == {}


@pytest.mark.slow
def test_transformers_4_opens_exports_with_equal_results(tmp_path, monkeypatch):
    older = tmp_path / "older"
    packages = (
        "transformers==4.57.6",
        "huggingface_hub<1",
        "tokenizers<0.23",
        "requests",
        "urllib3",
        "idna",
        "certifi",
    )
    packages += ("charset-normalizer", "hf-xet")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-compile", "--no-deps", "--target", str(older)]
    installed = subprocess.run([*pip, *packages], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"transformers 4.57 could not be installed: {installed.stderr[-200:]}")
    folders = [str(exported(name, tmp_path / name)) for name in MODELS]
    command = [sys.executable, "-c", OPEN, str(tmp_path / "old.pt"), *folders]
    environment = {"PYTHONPATH": str(older), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path / "new.pt"), *folders])
    exec(OPEN, {})
    new, old = (torch.load(tmp_path / f"{name}.pt") for name in ("new", "old"))
    for a, b in zip(new, old, strict=True):
        assert a[:3] == b[:3] and torch.equal(a[3], b[3])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder as of the Hub, and conversations."""
    folder = tmp_path_factory.mktemp("saved")
    chat = [{"role": "user", "content": "Say la"}, {"role": "assistant", "content": "la"}]
    (folder / "chats.jsonl").write_text(f"{json.dumps({'messages': chat})}\n" * 4)
    model = LlamaForCausalLM(MODELS["llama"])
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained("configs/quickstart").save_pretrained(folder / "model")
    return folder


def changed(saved, tmp_path, change=None, generation=None):
    folder = tmp_path / "changed"
    shutil.copytree(saved / "model", folder)
    if change:
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    if generation:
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | generation))
    return folder


def test_sampling_values_and_a_negative_pad_token_are_repaired(saved, tmp_path):
    values = {"max_length": 4096, "temperature": 0.9, "top_p": 0.6, "pad_token_id": -1}
    said = run(
        f"model.name={changed(saved, tmp_path, generation=values)}", "model.dtype=float32", "train.max_steps=1",
        f"data.dataset={saved}/chats.jsonl", "train.global_batch_size=1", "validation.every=null",
        f"output_dir={tmp_path}/run", "data.args.validation=0.5",
    )  # fmt: skip
    assert "do_sample: true" in said and "pad_token_id: -1" in said
    written = json.loads((tmp_path / "run/model/generation_config.json").read_text())
    assert written["do_sample"] is True and written["temperature"] == 0.9 and written["pad_token_id"] >= 0


def test_what_cannot_be_saved_is_refused_before_step_1(saved, tmp_path):
    folder = changed(saved, tmp_path, generation={"early_stopping": True})
    model = load_model(config.load(None, [f"model.name={folder}"]).model, torch.device("cpu"))
    meta = export.meta_model(model.config, model.generation_config, torch.float32)
    with pytest.raises(ValueError, match="early_stopping"):
        export.try_export(meta, a_tokenizer(), [3], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["changed"]


@pytest.mark.parametrize("kind", ["experts after three blocks", "full attention in each fourth block"])
def test_a_model_with_blocks_of_several_kinds_is_tried_under_their_own_numbers(kind, tmp_path):
    if kind == "experts after three blocks":
        ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
        experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
        sizes = {**SIZES, "num_hidden_layers": 5, "num_key_value_heads": SIZES["num_attention_heads"]}
        made = DeepseekV3Config(**sizes, **ranks, **experts, first_k_dense_replace=3, moe_intermediate_size=16)
    else:
        made = Qwen3NextConfig(**{**SIZES, "num_hidden_layers": 8, "head_dim": 16}, num_experts=0)
    model = Auto.from_config(made, dtype=torch.float32)
    meta = export.meta_model(model.config, model.generation_config, torch.bfloat16)
    export.try_export(meta, a_tokenizer(), [3], tmp_path)


Q = "model.layers.1.self_attn.q_proj"
BROKEN = {
    "missing": (lambda w: {k: v for k, v in w.items() if "layers.1.mlp.up_proj" not in k}, "layers.1.mlp.up_proj"),
    "shape": (lambda w: w | {f"{Q}.weight": torch.zeros(8, 32)}, rf"{Q}.weight .*\[8, 32\]"),
    "adapter": (lambda w: w | {f"{Q}.lora_A.default.weight": torch.zeros(4, 32)}, "lora_A.*merge"),
    "not finite": (lambda w: w | {f"{Q}.weight": w[f"{Q}.weight"] / 0}, f"{Q}.weight .*not finite"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_files_that_do_not_fit_the_model_are_refused_by_name(saved, tmp_path, how):
    change, said = BROKEN[how]
    cfg = config.load(None, [f"model.name={changed(saved, tmp_path, change)}"])
    for meta in (False, True):  # The other ranks of FSDP, and preview, have a meta model, without values.
        if not (meta and how == "not finite"):
            with pytest.raises(ValueError, match=said):
                load_model(cfg.model, torch.device("cpu"), meta=meta)
