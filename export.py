"""Model folders, as transformers and serving engines open them: tried before training, written, opened again."""

import copy
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import lora
from model import blocks, open_on_paper, open_saved
from templates import special_ids


def meta_model(hf_config, generation_config, dtype: torch.dtype, adapter: dict | None = None):
    """The model of a configuration on the meta device, as it is to be saved. `adapter`: see `lora.adapter_config`."""
    hf_config = type(hf_config).from_dict(hf_config.to_dict())
    hf_config.use_cache, hf_config.dtype = True, dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
        model.generation_config.update(**generation_config.to_diff_dict())
        if adapter:
            lora.add_adapter(model, adapter)
    return model


def repair_generation(generation: GenerationConfig) -> list[str]:
    """Change, in place, what transformers opens in a generation_config.json but refuses to save. Returns what was."""
    notes = []
    if (generation.pad_token_id or 0) < 0:
        notes.append(f"pad_token_id: {generation.pad_token_id} is dropped")
        generation.pad_token_id = None
    for name in ("early_stopping", "length_penalty") if (generation.num_beams or 1) == 1 else ():
        if getattr(generation, name, None):
            notes.append(f"{name}: {getattr(generation, name)} is dropped, which only beams read")
            setattr(generation, name, None)
    try:
        generation.validate(strict=True)
    except ValueError:  # If something else is wrong, `try_export` says so.
        generation.do_sample = True
        notes.append("do_sample: true is set, which its values for sampling need")
    return notes


def try_export(meta, tokenizer, stop_ids: list[int], output_dir: Path):
    """Raises ValueError unless `export` can write this model below `output_dir`, and that it reloads unchanged.
    Of the parameters, zeros are written for one block of each kind and for all that is outside the blocks."""
    meta, kinds = copy.deepcopy(meta), set()
    layers = blocks(meta)
    for i, block in reversed([*enumerate(layers)]):
        kind = str([(name, tensor.shape) for name, tensor in block.state_dict().items()])
        if kind in kinds:
            layers[i] = torch.nn.Identity()  # Has no parameters; the others keep their numbers, which may mean a kind.
        kinds.add(kind)
    is_adapter, saved = hasattr(meta, "adapter_config"), meta.state_dict(keep_vars=True)
    zeros = {name: torch.zeros_like(t, device="cpu") for name, t in saved.items() if t.requires_grad or not is_adapter}
    probe = f"{tokenizer.chat_template} {' '.join(tokenizer.all_special_tokens)}"
    with tempfile.TemporaryDirectory(prefix="unfinished_trial_", dir=output_dir) as folder:
        folder = Path(folder) / "model"
        try:
            export(meta, zeros, tokenizer, stop_ids, folder)
            GenerationConfig.from_pretrained(folder)
            reopened = AutoTokenizer.from_pretrained(folder)
            if reopened.chat_template != tokenizer.chat_template or reopened(probe) != tokenizer(probe):
                raise ValueError("the saved tokenizer gives other tokens")
            if not is_adapter:
                wrong = open_on_paper(folder, AutoConfig.from_pretrained(folder))
                missing = wrong["missing_keys"] & saved.keys()
                if keys := wrong["unexpected_keys"] | wrong["mismatched_keys"] | missing:
                    raise ValueError(f"the saved parameters do not open again: {sorted(map(str, keys))[:3]}")
        except Exception as error:
            raise ValueError(f"this model cannot be saved: {error}; correct its folder, or a copy of it") from error


def export(meta, params: dict, tokenizer, stop_ids: list[int], folder: Path):
    """Write a model folder that `from_pretrained` and serving engines open, or a PEFT adapter's. `meta`: the
    `meta_model`, which is one again afterwards; `params`: by name, tied ones once. Needs no copy of the parameters."""
    shutil.rmtree(folder, ignore_errors=True)
    generation = meta.generation_config
    generation._from_model_config = False  # Else transformers 4 would take the values of config.json again.
    own = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    ends = list(dict.fromkeys([*stop_ids, *(id for id in own if id in special_ids(tokenizer))]))  # own: as after calls
    generation.eos_token_id = ends if len(ends) > 1 else ends[0]
    generation.pad_token_id = generation.pad_token_id if generation.pad_token_id is not None else stop_ids[0]
    tokenizer.save_pretrained(folder)
    if hasattr(meta, "adapter_config"):
        (folder / "adapter_config.json").write_text(json.dumps(meta.adapter_config), encoding="utf-8")
        save_file(lora.peft_parameters(meta, params), folder / "adapter_model.safetensors")
        generation.save_pretrained(folder)
    else:
        meta.load_state_dict(params, assign=True, strict=False)
        meta.tie_weights()
        meta.save_pretrained(folder)
        meta.to("meta")
    add_older_names(folder)
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "tokenizer_config.json", path)  # safetensors lets nobody but the owner read them.


def add_older_names(folder: Path):
    """Write what engines on transformers 4 read beside the names of transformers 5, and nothing of this machine."""
    for path in folder.glob("*config.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        for part in (settings, *(v for v in settings.values() if isinstance(v, dict) and "model_type" in v)):
            for name in ("_name_or_path", "name_or_path", "is_local", "local_files_only"):
                part.pop(name, None)
            part |= {"torch_dtype": part["dtype"]} if part.get("dtype") else {}
            part |= older_rope(part.get("rope_parameters") or {})
            part |= {"num_experts": part["num_local_experts"]} if part.get("num_local_experts") else {}
        if settings.get("tokenizer_class") == "TokenizersBackend":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(settings.get("extra_special_tokens"), list):  # transformers 4 knows only a dict of that name.
            settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def older_rope(rope: dict) -> dict:
    """The names that transformers 4.57 has for `rope_parameters`; none where it cannot express them."""
    older, types = {}, ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
    if rope.keys() == {"full_attention", "sliding_attention"}:  # As Gemma 3.
        sliding, rope = rope["sliding_attention"], rope["full_attention"]
        if sliding.get("rope_type") != "default":
            return {}
        older["rope_local_base_freq"] = sliding.get("rope_theta")
    if "rope_theta" not in rope or rope.get("rope_type") not in types:
        return {}
    scaling = dict(rope)
    older |= {name: scaling.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    return older | {"rope_scaling": None if scaling == {"rope_type": "default"} else scaling}


def verify_export(folder: Path, params: dict):
    """Raises RuntimeError unless the folder, opened as a user opens it, has exactly these parameters, in its dtype."""
    reloaded = open_saved(folder, "auto").state_dict()
    if different := [n for n, p in params.items() if not torch.equal(reloaded[n], p.to(reloaded[n].dtype))]:
        raise RuntimeError(f"{folder} does not hold the trained parameters: {different[:3]}")
