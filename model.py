"""The model: load, check, DDP and FSDP, loss."""

import contextlib
import functools
import json
import math
import os
import re
import shutil
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.stateless import _reparametrize_module
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

import attention
import distributed
import lora
from packing import collate
from templates import IGNORE_INDEX, special_ids
from tokens import open_native

logging.disable_progress_bar()  # One bar per export is noise in a log.


def take_device(local_rank: int) -> torch.device:
    """This rank's GPU, which it uses from here on, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Packed rows differ in length; segments that can grow keep the allocator's memory from fragmenting.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def load_model(model_cfg, device: torch.device, meta: bool = False, rows: int = 0) -> torch.nn.Module:
    """The model of a `config.Model`, on the CPU, ready for training on `device`; trained parameters are float32.

    Random parameters are the same on every rank if the caller has set the seed. `meta`: on the meta device, without
    values; `rows`: of the embedding, at least. Raises ValueError for a model that cannot be trained."""
    folder = Path(model_cfg.name)
    if is_adapter := (folder / "adapter_config.json").is_file():
        model_cfg = lora.settings_of(model_cfg)
    if model_cfg.lora.base and not model_cfg.lora.rank:
        raise ValueError(f"model.lora.base = {model_cfg.lora.base} needs model.lora.rank of at least 1")
    name, revision = model_cfg.name, model_cfg.revision
    hf_config = open_native(AutoConfig, name, revision)
    kernel = attention.choose(model_cfg.attention, model_cfg.dtype, model_class(name, hf_config), device)
    # Trained parameters are float32. Those below an adapter are frozen, in the dtype of the run or model.lora.base.
    base = (model_cfg.lora.base or model_cfg.dtype).replace("nf4", "bfloat16")  # `parallelize` quantizes it.
    dtype = getattr(torch, base) if model_cfg.lora.rank else torch.float32
    options = {"dtype": dtype, "attn_implementation": kernel}
    if model_cfg.from_scratch or meta:
        with opening(name), torch.device("meta" if meta else "cpu"):
            model = AutoModelForCausalLM.from_config(hf_config, **options)
        if not model_cfg.from_scratch:
            check_loaded(name, model, open_on_paper(name, hf_config, revision))
    else:
        model = open_complete(name, config=hf_config, revision=revision, **options)
        model.digest = 0  # By which a resumed adapter knows its base.
        for parameter, p in model.named_parameters():
            if not math.isfinite(p.detach().sum(dtype=torch.float64)):
                raise ValueError(f"model.name = {name!r}: {parameter} holds values that are not finite")
            model.digest = zlib.crc32(p.detach().flatten()[:64].float().numpy(), model.digest)
        head, tied = model.get_output_embeddings(), model.config.get_text_config().tie_word_embeddings
        if tied and head is not None and head.weight is not model.get_input_embeddings().weight:
            raise ValueError(f"model.name = {name!r} has an output layer of its own: set tie_word_embeddings=false")
    if model_cfg.lora.rank:
        lora.add_adapter(model, lora.adapter_config(model, model_cfg))
    if is_adapter:
        lora.load_adapter(model, folder)
    if rows > (old := model.get_input_embeddings().num_embeddings):  # Rows of added tokens: the mean of the others.
        model.resize_token_embeddings(rows, mean_resizing=False)
        for p in [p for layer in lora.embeddings(model).values() for p in layer.parameters()]:
            p.data[old:] = p.data[:old].float().mean(0)
    model.config.use_cache = False
    model.train()
    if model_cfg.activation_checkpointing:
        # Newer versions of transformers have renamed the method and its argument.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return model


def model_class(name: str, hf_config):
    """The class of a causal language model. Raises ValueError for another model and for quantized parameters."""
    if quantization := getattr(hf_config, "quantization_config", None):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
        raise ValueError(f"model.name = {name!r} is quantized ({method}): use a bfloat16 or float32 copy")
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(hf_config), None)
    if found is None:
        raise ValueError(f"model.name = {name!r} ({hf_config.model_type}) is not a causal language model")
    found = found[0] if isinstance(found, (list, tuple)) else found
    if found.config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:  # So AutoModelForCausalLM would not open what is saved.
        raise ValueError(f"model.name = {name!r} ({hf_config.model_type}) cannot be saved as a model of its own")
    return found


def open_saved(name: str, dtype, kernel: str | None = None):
    """A model in eval mode, of a folder or of the Hub; of an adapter's folder, its base with the adapter. `kernel`: the
    attention; None: SDPA where the model can, else eager."""
    if (Path(name) / "adapter_config.json").is_file():
        return lora.open_adapter(Path(name), dtype, kernel)
    return open_complete(str(name), dtype=dtype, attn_implementation=kernel).eval()


@contextlib.contextmanager
def opening(name):
    """transformers prints no report of what does not fit, and its errors name the model."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except (SafetensorError, KeyError) as error:  # a file that was cut off; a name that transformers does not know
        raise ValueError(f"model.name = {str(name)!r} cannot be opened: {error!r}; copy its files again") from error
    finally:
        logging.set_verbosity(verbosity)


def open_complete(name: str, **options):
    """A model of a folder or of the Hub. Raises ValueError where its files do not fit, instead of making up values."""
    with opening(name):
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # `check_loaded` says what is wrong.
        model, found = AutoModelForCausalLM.from_pretrained(name, **options, trust_remote_code=False)
    check_loaded(name, model, found)
    model.unused_names = sorted(found["unexpected_keys"])  # What is in the files and not in the model.
    return model


def open_on_paper(name, hf_config, revision: str | None = None) -> dict:
    """What transformers says of loading the files of a folder or of the Hub's cache (`output_loading_info`), from the
    names and shapes there alone; of no files, nothing."""
    cached = try_to_load_from_cache(str(name), "config.json", revision=revision) if not Path(name).is_dir() else None
    folder = Path(cached).parent if isinstance(cached, str) else Path(name)
    files, index = [folder / "model.safetensors"], folder / "model.safetensors.index.json"
    if not files[0].is_file() and index.is_file():
        files = [folder / file for file in {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}]
    if not all(file.is_file() for file in files):
        return {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
    shapes = {}
    for file in files:
        with opening(name), safe_open(file, "pt") as tensors:
            shapes |= {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # Fake tensors, which have no values, belong to one thread.
    try:
        with opening(name), FakeTensorMode(allow_non_fake_inputs=True):  # Gemma keeps a scalar on the meta device.
            options = {"state_dict": {key: torch.empty(shape) for key, shape in shapes.items()}, "config": hf_config}
            options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
            return model_class(name, hf_config).from_pretrained(None, dtype=torch.float32, **options)[1]
    finally:
        del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]


def check_loaded(name: str, model, found: dict):
    """Raises ValueError where a model's files lack parameters or have others. `found`: its `output_loading_info`."""
    model_name = f"model.name = {name!r}"
    if adapters := [key for key in sorted(found["unexpected_keys"]) if "lora_" in key or ".base_layer." in key]:
        raise ValueError(f"{model_name} holds an adapter ({adapters[0]}): merge it with PEFT's merge_and_unload")
    for key, there, here in sorted(found["mismatched_keys"]):
        shapes = f"{[*there]} in its file, {[*here]} by its config.json"
        raise ValueError(f"{model_name}: the shape of {key} is {shapes}; take both from one model")
    if missing := sorted(found["missing_keys"] & {parameter for parameter, _ in model.named_parameters()}):
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(f"{model_name}: {len(missing)} parameters are not in its files: {names}; copy all of it")


def stop_ids_of(model, tokenizer) -> list[int]:
    """The tokens that end a saved model's answers."""
    stop = model.generation_config.eos_token_id
    stop = tokenizer.eos_token_id if stop is None else stop
    if stop is None:
        raise ValueError("neither the model nor its tokenizer says which token ends an answer (eos_token)")
    return stop if isinstance(stop, list) else [stop]


def max_positions(model) -> int:
    """The most tokens that a model takes, if its configuration says so; else 2^31."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31


def check_model(model, cfg, world_size: int, tokenizer, longest: int) -> list[str]:
    """Raises ValueError where the model has no embedding for a token or for a position of the longest example (in
    tokens), or where this number of ranks cannot do what the section `parallel` requests. Returns what may surprise."""
    embedding, positions = model.get_input_embeddings(), max_positions(model)
    if len(tokenizer) > embedding.num_embeddings:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model's embedding {embedding.num_embeddings}")
    if cfg.tokenizer.add_tokens and not embedding.weight.requires_grad:
        raise ValueError("tokenizer.add_tokens needs model.lora.train_embeddings=true, or they would not be trained")
    others = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not embedding]
    is_table = any(positions <= module.num_embeddings < longest for module in others)
    # Dynamic frequencies, beyond the positions, are those of the longest row so far.
    is_dynamic = "'dynamic'" in str(getattr(model.config.get_text_config(), "rope_parameters", None))
    if longest > positions and (is_table or is_dynamic):
        raise ValueError(f"the longest conversation has {longest:,} tokens: set data.max_seq_length={positions}")
    replicas, context = cfg.parallel.replicas, cfg.parallel.context
    heads = getattr(model.config.get_text_config(), "num_attention_heads", 0)
    if world_size % replicas or world_size % context:
        raise ValueError(f"parallel.replicas and parallel.context must divide the number of ranks, {world_size}")
    if heads % context:
        raise ValueError(f"parallel.context = {context} must divide the model's {heads} attention heads")
    if world_size == 1 and cfg.parallel.cpu_offload:
        raise ValueError("parallel.cpu_offload needs more than one rank: it is an FSDP feature")
    beyond = f"the longest conversation has {longest:,} tokens, the model's max_position_embeddings are {positions:,}"
    return [f"{beyond}; see data.max_seq_length"] if longest > positions else []


@torch.no_grad()
def notes_of(model, cfg, tokenizer, examples) -> list[str]:
    """What is trained as it stands but may surprise, a line each. `examples`: a `tokens.TokenizedDataset`."""
    found, adapter, weight = [], getattr(model, "adapter_config", None), model.get_input_embeddings().weight
    if adapter:
        settings = ", ".join(f"{key} {adapter[key]}" for key in ("r", "lora_alpha", "lora_dropout", "target_modules"))
        frozen = {name.split(".")[-2] for name, p in model.named_parameters() if p.ndim > 1 and not p.requires_grad}
        rest = ", ".join(sorted(frozen - {*adapter["target_modules"]})) or "norms"
        found.append(f"LoRA from {cfg.model.name}: {settings}; frozen, without an adapter: {rest}")
    if cfg.model.from_scratch and any(Path(cfg.model.name).glob("*.safetensors")):
        found.append(f"{cfg.model.name} holds trained parameters, but model.from_scratch=true makes random ones")
    if model.config._attn_implementation == "per_document_varlen" and not is_compiled(model, cfg.model.compile):
        found.append("blocks are not compiled, which is slower: there is no C compiler, or model.compile is false")
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        found.append("output_router_logits: the router's auxiliary loss (router_aux_loss_coef) is left out")
    special = sorted(special_ids(tokenizer))
    if special and not weight.requires_grad and not weight.is_meta:
        rows, typical = weight[special].float(), weight[:1000].float().std(0).norm()
        closest = torch.cdist(rows, rows).fill_diagonal_(torch.inf).amin(1)  # (special tokens,)
        equal = {special[i] for i in (closest < 0.1 * typical).nonzero()[:, 0].tolist()}
        if ids := sorted(equal & {id for i in examples.first(1000) for id in examples[i][1].tolist()}):
            names = " ".join(tokenizer.convert_ids_to_tokens(ids))
            found.append(f"{names}: untrained in the base, and frozen: set model.lora.train_embeddings=true")
    return found


# ---- parallel --------------------------------------------------------------------------------------------------------
def choose_strategy(strategy: str, model, world_size: int, gpu_bytes: float | None) -> str:
    """auto: ddp where parameters, gradients and Adam's two moments (16 bytes per trained parameter) take at most half a
    GPU. `gpu_bytes`: memory of each GPU; None: the ranks are on CPUs."""
    if strategy != "auto" or world_size == 1 or gpu_bytes is None:
        return "ddp" if strategy == "auto" else strategy
    needed = sum(p.numel() * (16 if p.requires_grad else p.element_size()) for p in model.parameters())
    return "ddp" if needed <= gpu_bytes / 2 else "fsdp"


def blocks(model) -> torch.nn.ModuleList:
    """The decoder's layers: what is compiled and sharded one by one."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module)]
    return max(lists, key=lambda module: sum(p.numel() for p in module.parameters()))


def is_compiled(model, requested: bool | None) -> bool:
    """`model.compile`, or by default whether a graph holds the attention too and Triton finds its C compiler."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    default = model.config._attn_implementation == "per_document_varlen" and compiler is not None
    return default if requested is None else requested


def compile_blocks(model, loss: "PackedLoss"):
    # Blocks share their code; beyond the limit dynamo would silently run those that differ uncompiled.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    # torch's cache on disk ignores the processor: code compiled for AVX-512 would compute wrong numbers on AVX2.
    torch.compiler.config.cache_key_tag = torch.backends.cpu.get_cpu_capability()
    modules = [*blocks(model)]
    if loss.skips_positions:  # The last block, whose graph breaks, would impose its code on all: its parts have theirs.
        modules += [part for part in modules.pop().children() if "forward" not in vars(part)]
    for module in modules:
        module.compile(dynamic=True)
    model.add_gradients = torch.compile(torch._foreach_add_)  # It reads two dtypes faster.


def parallelize(model, cfg, strategy: str, world_size: int, device: torch.device, cp_group=None):
    """(the `PackedLoss` to call, or DDP around it; the model in it, which holds the parameters). With fsdp, only rank 0
    needs a model with values: the others may bring a meta model and receive rank 0's parameters, a block at a time."""
    if strategy == "fsdp":  # Rank 0's model has values; the meta models of the other ranks take its dtypes.
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        found = (has_plain_head(model), [tensor.dtype for _, tensor in tensors]) if dist.get_rank() == 0 else None
        plain_head, dtypes = distributed.broadcast_object(found)
        for (_, tensor), dtype in zip(tensors, dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)
    else:
        if cfg.model.lora.base == "nf4" and hasattr(model, "adapter_config"):
            lora.quantize(model, device)
        plain_head = has_plain_head(model.to(device))
    loss = PackedLoss(model, plain_head, cp_group)
    if is_compiled(model, cfg.model.compile):
        compile_blocks(model, loss)
    dtype = getattr(torch, cfg.model.dtype)
    if strategy == "fsdp":
        shard(model, cfg, world_size, device)
        # The loss does not go through model.forward: have FSDP gather the parameters outside the blocks there too.
        model.packed_loss = loss.forward
        register_fsdp_forward_method(model, "packed_loss")
        loss.forward = model.packed_loss
        return loss, model
    if world_size == 1:
        return loss, model
    # DDP has to know whether a trained parameter gets no gradient, such as an image tower in a text-only run,
    # or experts that no token is sent to: an empty row shows it.
    empty_row = collate(None, [], device, dist.get_rank() % cfg.parallel.context, cfg.parallel.context)
    with cast_params(model, dtype):
        loss(empty_row).backward()
    unused = distributed.broadcast_object(any(p.grad is None for p in model.parameters() if p.requires_grad))
    loss.zero_grad(set_to_none=True)
    parallel_loss = DistributedDataParallel(loss, gradient_as_bucket_view=True, find_unused_parameters=unused)
    parallel_loss.broadcast_buffers = False  # In each forward pass: no rank changes a buffer.
    # After the first backward pass DDP regroups its buckets, which changes the rounding. So that is done here, and the
    # first step after a launch is computed as in the middle of a run.
    with cast_params(model, dtype):
        parallel_loss(empty_row).backward()
    loss.zero_grad(set_to_none=True)
    return parallel_loss, model


def shard(model, cfg, world_size: int, device: torch.device):
    """FSDP, in place, with the parameters of rank 0."""
    shape, names = (world_size,), ("shard",)
    if cfg.parallel.replicas > 1:
        shape, names = (cfg.parallel.replicas, world_size // cfg.parallel.replicas), ("replicate", "shard")
    precision = MixedPrecisionPolicy(param_dtype=getattr(torch, cfg.model.dtype), reduce_dtype=torch.float32)
    options = {"mesh": init_device_mesh(device.type, shape, mesh_dim_names=names), "mp_policy": precision}
    if cfg.parallel.cpu_offload:
        options["offload_policy"], device = CPUOffloadPolicy(), torch.device("cpu")
    in_blocks = {module for block in blocks(model) for module in block.modules()}
    for block in blocks(model):
        distributed.broadcast_modules(block.modules(), device)
        fully_shard(block, **options)
    distributed.broadcast_modules([module for module in model.modules() if module not in in_blocks], device)
    model.tie_weights()
    fully_shard(model, **options)


def is_sharded(model) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


@contextlib.contextmanager
def cast_params(model, dtype: torch.dtype):
    """Within it the model computes with copies of its parameters in `dtype`, made once, while gradients go to the
    parameters themselves, which stay float32. FSDP does the same by itself, a block at a time; so both use the same
    precision. (Autocast would keep the sums between blocks in float32, and cast the inputs of each product.)"""
    groups, copies, add = {}, {}, getattr(model, "add_gradients", torch._foreach_add_)
    for name, p in model.named_parameters():
        if p.is_floating_point() and p.dtype != dtype and not isinstance(p, DTensor):
            block = re.match(r".*?\.\d+\.", name)  # "model.layers.3."
            groups.setdefault((block.group() if block else name, p.requires_grad), []).append((name, p))
    for group in groups.values():
        names, parameters = zip(*group, strict=True)
        copies |= zip(names, Cast.apply(dtype, add, *parameters), strict=True)
    with _reparametrize_module(model, copies, tie_weights=True):
        yield


class Cast(torch.autograd.Function):
    """The parameters of a block in another dtype. Their gradients are added to the parameters' own as they are:
    autograd would first convert them to float32, and so read and write nearly twice as much memory. (DDP's hook runs
    even so, but hooks on a parameter's gradient see only the first row's.)"""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, add, *parameters):
        ctx.set_materialize_grads(False)
        ctx.add, ctx.parameters = add, parameters
        return tuple(p.to(dtype) for p in parameters)

    @staticmethod
    def backward(ctx, *gradients):
        pairs = [*zip(ctx.parameters, gradients, strict=True)]
        if more := [(p.grad, g) for p, g in pairs if g is not None and p.grad is not None]:
            ctx.add(*map(list, zip(*more, strict=True)))
        return None, None, *(g.to(p.dtype) if g is not None and p.grad is None else None for p, g in pairs)


# ---- loss ------------------------------------------------------------------------------------------------------------
class PackedLoss(torch.nn.Module):
    """Called with a packed row (`packing.collate`): `scale` times the sum of its token losses, a float32 scalar, from
    which the backward pass has to begin (see `HeadLoss`). The output layer runs only where a trained token is
    predicted. A row with none gives a zero that still has a gradient for each parameter. `plain_head`: see
    `has_plain_head`; `cp_group`: the ranks that share the row, each with a part of it."""

    def __init__(self, model, plain_head: bool, cp_group=None):
        super().__init__()
        self.model, self.plain_head = model, plain_head
        self.cp = {} if cp_group is None else {"cp_group": cp_group}
        self.loss_positions = None  # Of the row that the decoder computes.
        self.skips_positions = False
        recomputes = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        if plain_head and not recomputes:  # A block that is recomputed in the backward pass would find no positions.
            # After its attention, the last block is needed only where a trained token is predicted.
            block = blocks(model)[-1]
            for module in (getattr(block, "mlp", None), getattr(getattr(block, "self_attn", None), "o_proj", None)):
                if is_pointwise(module, model):
                    module.forward = functools.partial(self.at_loss_positions, module.forward)
                    self.skips_positions = True

    def forward(self, batch: dict, scale: float = 1.0) -> torch.Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "position_ids", "documents")} | self.cp
        loss_positions, targets = batch["loss_positions"], batch["targets"]  # (trained,)
        if self.plain_head:
            self.loss_positions = loss_positions
            hidden = self.model.get_decoder()(**inputs, use_cache=False).last_hidden_state[0]  # (tokens, hidden)
            self.loss_positions = None
            weight = self.model.get_output_embeddings().weight
            return HeadLoss.apply(hidden[loss_positions], weight, targets, scale, torch.is_grad_enabled())
        logits = self.model(**inputs, use_cache=False, logits_to_keep=loss_positions).logits[0]
        if len(logits) != len(loss_positions):  # The model does not know logits_to_keep.
            logits = logits[loss_positions]  # (trained, vocabulary)
        return scale * F.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=IGNORE_INDEX)

    @torch.compiler.disable  # The number of positions differs from row to row.
    def at_loss_positions(self, forward, x):
        """`forward` of x, (1, tokens, hidden), where a trained token is predicted; elsewhere zero."""
        if self.loss_positions is None:
            return forward(x)
        output = forward(x[:, self.loss_positions])  # (1, trained, hidden)
        return output.new_zeros(1, x.shape[1], output.shape[2]).index_copy(1, self.loss_positions, output)


class HeadLoss(torch.autograd.Function):
    """`scale` times the sum of the cross entropies of `hidden @ weight.T`: hidden (positions, hidden), weight
    (vocabulary, hidden), targets (positions,) int64, where -100 is ignored. It takes positions in chunks, and each
    chunk's gradient while it has the logits, so that no more than LOGITS of them exist at once (as Liger's fused linear
    cross entropy: Hsu et al., 2024, https://arxiv.org/abs/2410.10989). The backward pass begins here: multiplied by a
    scale there, the weight's gradient would be read and written once more."""

    LOGITS = 2**27  # At once: 512 MiB in float32.

    @staticmethod
    def forward(ctx, hidden, weight, targets, scale: float, with_gradient: bool):
        h, w = hidden.to(weight.dtype), weight
        needs_hidden, needs_weight = (with_gradient and needed for needed in ctx.needs_input_grad[:2])
        grad_hidden, grad_weight = torch.empty_like(h) if needs_hidden else None, None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        size = max(1, HeadLoss.LOGITS // len(w))
        for start in range(0, len(h), size):
            chunk = slice(start, start + size)
            log_p = (h[chunk] @ w.T).float().log_softmax(1)  # (chunk, vocabulary)
            counted = scale * (targets[chunk] != IGNORE_INDEX)[:, None].float()  # (chunk, 1)
            index = targets[chunk, None].clamp(min=0)
            loss -= (log_p.gather(1, index) * counted).sum()
            if not (needs_hidden or needs_weight):
                continue
            # The gradient of the logits: softmax minus one at the target.
            gradient = log_p.exp_().scatter_add_(1, index, -torch.ones_like(index, dtype=log_p.dtype))
            gradient = gradient.mul_(counted).to(w.dtype)
            if needs_hidden:
                torch.mm(gradient, w, out=grad_hidden[chunk])
            if needs_weight:
                part = gradient.T @ h[chunk]  # (vocabulary, hidden)
                grad_weight = part if grad_weight is None else grad_weight.float().add_(part)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    def backward(ctx, one):
        torch._assert_async(one == 1, "HeadLoss: give PackedLoss the scale, and differentiate what it returns")
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if g is None else g.to(dtype) for g, dtype in gradients), None, None, None


@torch.no_grad()
def has_plain_head(model) -> bool:
    """Measures whether logits are the last hidden states times the output weight, no more. (False is always safe.)"""
    head, ids = model.get_output_embeddings(), torch.arange(4, device=model.device)[None]
    if head is None or getattr(head, "bias", None) is not None:  # A bias may be zero now, and trained.
        return False
    try:  # A cap shows on large logits. Only the head is tested, with the attention that runs on any device.
        cast, hook = cast_params(model, model.config.dtype), lambda _, __, output: 1000 * output.float()
        with cast, attention.eval_mode(model, "eager"), head.register_forward_hook(hook):
            hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            logits = model(input_ids=ids, use_cache=False).logits.float()
        plain = 1000 * (hidden @ head.weight.T.to(hidden.dtype)).float()
    except Exception:  # Some layers run only on a GPU, and some models have no such decoder.
        return False
    tolerance = {"rtol": 1e-3, "atol": 1e-4 * float(logits.abs().max())}
    return plain.shape == logits.shape and torch.allclose(plain, logits, **tolerance)


@torch.no_grad()
def is_pointwise(module, model) -> bool:
    """Whether a part of a block is an MLP or a linear layer that maps one tensor to one, position by position."""
    if not type(module).__name__.endswith(("MLP", "Linear")):
        return False
    width = getattr(module, "in_features", model.config.get_text_config().hidden_size)
    try:
        dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
        output = module(torch.zeros(1, 3, width, device=model.device, dtype=dtype))
    except Exception:  # It takes more than one argument.
        return False
    return isinstance(output, torch.Tensor) and output.shape[:2] == (1, 3)
