"""The model: load, DDP and FSDP, loss, optimizer, export."""

import contextlib
import itertools
import json
import math
import os
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

import attention
import data
import lora
import packing
import ranks
from templates import IGNORE_INDEX

logging.disable_progress_bar()  # a bar per export says nothing; what matters is printed by train_sft.py


# ---- load ------------------------------------------------------------------------------------------------------------


def take_device(local_rank: int) -> torch.device:
    """This process's GPU, which it uses from here on, or the CPU. Raises ValueError where there are too few GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"this machine has {torch.cuda.device_count()} GPU(s), and more processes were started; start one for each"
        )
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # rows differ in length: fewer gaps
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def load(config, device: torch.device, outline: bool = False) -> torch.nn.Module:
    """The model of a `config.Model`, on the CPU; random weights are the same on every rank (caller seeds). Trained
    weights are float32. `outline`: without weights (on the meta device)."""
    if (Path(config.name) / "adapter_config.json").is_file():
        raise ValueError(
            f"model.name = {config.name!r} is a LoRA adapter; add it to its base first: python checkpoint.py "
            f"{config.name} A-FOLDER, and name that"
        )
    with data.from_hub("model.name", config.name):
        model_config = AutoConfig.from_pretrained(config.name, revision=config.revision)
    kernel = attention.choose(config, class_of(config, model_config), device)
    options = {"dtype": base_dtype(config), "attn_implementation": kernel}
    with data.from_hub("model.name", config.name):
        if config.from_scratch or outline:
            with torch.device("meta" if outline else "cpu"):
                model = AutoModelForCausalLM.from_config(model_config, **options)
        else:
            options |= {"config": model_config, "revision": config.revision}
            model = AutoModelForCausalLM.from_pretrained(config.name, **options)
    if not (config.from_scratch or outline):
        head, tied = model.get_output_embeddings(), model.config.get_text_config().tie_word_embeddings
        if tied and head is not None and head.weight is not model.get_input_embeddings().weight:
            raise ValueError(
                f"model.name = {config.name!r} has an output layer of its own, and its config.json says "
                "tie_word_embeddings: true, so that saving would lose that layer; set it to false there"
            )
    prepare_for_training(model, config)
    return model


def class_of(config, model_config):
    """The class of a `config.Model`, whose transformers configuration is given. Raises ValueError where that is no
    causal language model, or its weights are quantized or not there."""
    folder, weights = Path(config.name), ("*.safetensors", "*.bin")
    if folder.is_dir() and not config.from_scratch and not any(path for kind in weights for path in folder.glob(kind)):
        raise ValueError(
            f"model.name = {config.name!r} holds no weights (*.safetensors or *.bin); name a folder that does, or set "
            "model.from_scratch=true for random ones"
        )
    quantized = getattr(model_config, "quantization_config", None)
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else type(quantized).__name__
        raise ValueError(
            f"model.name = {config.name!r} has quantized weights ({method}), which cannot be trained; name a copy "
            "of it in bfloat16 or float32"
        )
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None)
    if found is None:
        raise ValueError(f"model.name = {config.name!r} ({model_config.model_type}) is no causal language model")
    return found[0] if isinstance(found, (list, tuple)) else found


def open_saved(name: str, dtype, implementation: str | None = None):
    """The model of a folder or of the Hub, for answering; of an adapter's folder, its base with the adapter.
    `implementation`: of attention; None: SDPA where the model can, else eager."""
    if (Path(name) / "adapter_config.json").is_file():
        return lora.open_adapter(Path(name), dtype, implementation)
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation=implementation).eval()


def base_dtype(config) -> torch.dtype:
    """Of the stored weights of a `config.Model`, except an adapter's."""
    return getattr(torch, config.lora.base_dtype or config.dtype) if config.lora.rank else torch.float32


def prepare_for_training(model, config):
    if config.lora.rank:
        lora.add_adapter(model, lora.adapter_config(model, config))
    model.config.use_cache = False
    model.train()
    if config.activation_checkpointing:
        # (newer versions of transformers warn where it is called by its older name)
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})  # (positional: the keyword was renamed too)


def check_vocabulary(model, tokenizer):
    """Raises ValueError where the tokenizer has ids that the model has no embedding for."""
    embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model's embedding only {embeddings}")


def positions_of(model) -> int:
    """The most tokens that a model takes, if its configuration says; else 2^31."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31


def check_positions(model, *lengths: int):
    """Raises ValueError where a conversation is longer than a model that has learned its positions one by one."""
    positions = positions_of(model)
    others = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not model.get_input_embeddings()]
    if max(lengths) > positions and any(positions <= module.num_embeddings < max(lengths) for module in others):
        raise ValueError(
            f"the longest conversation has {max(lengths):,} tokens, and the model {positions:,} positions "
            f"(max_position_embeddings): set data.max_seq_length={positions}"
        )


@contextlib.contextmanager
def answering(model, implementation: str | None = None):
    """In eval mode, and with another attention, for a while; None: with its own."""
    own, was_training = model.config._attn_implementation, model.training
    model.eval()
    try:
        model.set_attn_implementation(implementation or own)
        yield
    finally:
        model.set_attn_implementation(own)
        model.train(was_training)


@torch.no_grad()
def check_attention(model, config) -> bool:
    """Raises ValueError unless the model of a `config.Model` gives the same logits in a packed row as by itself, when
    transformers computes its attention and numbers its tokens: measured. Returns what `keeps_documents_apart` finds in
    the dtype of the weights, before rounding can hide it; True where the model runs only on a GPU."""
    generator = torch.Generator().manual_seed(0)
    vocabulary, limit = model.get_input_embeddings().num_embeddings, 1e-3
    if base_dtype(config) != torch.float32:
        limit = 0.2  # rounded, experts may change places
    ids = torch.randint(vocabulary, (1, 12), generator=generator).to(model.device)
    positions, ours = torch.arange(12, device=model.device)[None], model.config._attn_implementation != "eager"
    try:
        with answering(model, "eager"):
            alone = model(ids, use_cache=False).logits.float()  # (1, 12, vocabulary)
            first_half = model(ids[:, :6], use_cache=False).logits.float()
    except Exception:  # some layers run only on a GPU
        return True
    if not (first_half - alone[:, :6]).norm() <= limit * alone[:, :6].norm():
        raise ValueError(
            f"model.name = {config.name!r}: its tokens see those that come later: no causal language model"
        )
    mend = "set model.attention=eager" if ours else "it numbers its tokens in its own way, and cannot be trained here"
    implementation = "per_document" if ours else "eager"  # (varlen does not compute in float32)
    try:
        with answering(model, implementation):
            packed = model(ids, position_ids=positions, use_cache=False).logits.float()
    except Exception as error:
        raise ValueError(
            f"model.name = {config.name!r} does not take packed rows ({type(error).__name__}: {error}); {mend}"
        ) from error
    off = (packed - alone).norm() / alone.norm()
    if not off <= limit:
        raise ValueError(
            f"model.name = {config.name!r}: in a packed row this model would give other logits than by itself (off by "
            f"{off:.1%}); {mend}"
        )
    return keeps_documents_apart(model, model.device, base_dtype(config), implementation)


@torch.compiler.set_stance("force_eager")  # (few and short: not worth a graph)
@torch.no_grad()
def keeps_documents_apart(model, device: torch.device, dtype: torch.dtype, implementation: str | None = None) -> bool:
    """Whether each document of a packed row gets the logits that it gets alone, whatever stands beside it: measured on
    the loaded model, which computes in `dtype` on `device`. `implementation`: of attention; None: the model's. Every
    rank of a sharded model has to call it."""
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    first, second, third, other_first, other_third = (
        torch.randint(vocabulary, (1, length), generator=generator) for length in (7, 12, 5, 7, 5)
    )

    def logits_of_second(*documents):
        positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
        ends = list(itertools.accumulate(d.shape[1] for d in documents))
        packed = attention.Documents(ends, torch.tensor([0, *ends], dtype=torch.int32, device=device))
        ids, positions = torch.cat(documents, dim=1).to(device), positions.to(device)
        logits = model(ids, position_ids=positions, documents=packed, use_cache=False).logits[0].float()
        at = 0 if len(documents) == 1 else 7
        return logits[at : at + 12]  # (12, vocabulary)

    with answering(model, implementation):
        alone = logits_of_second(second)
        packed = logits_of_second(first, second, third)
        beside_others = logits_of_second(other_first, second, other_third)
    scale = alone.abs().max().clamp(min=1e-3)
    rounding = 1e-4 if dtype == torch.float32 else 0.1  # (rows of other lengths may take other kernels)
    return bool(
        (packed - beside_others).abs().max() <= 1e-4 * scale and (packed - alone).abs().max() <= rounding * scale
    )


@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def check_shared_row(model, device: torch.device, group, dtype: torch.dtype):
    """Raises ValueError unless the ranks that share a row get the logits that one alone gets: measured, as above."""
    rank, size, tokens = dist.get_rank(group), dist.get_world_size(group), 40
    vocabulary, generator = model.get_input_embeddings().num_embeddings, torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, tokens), generator=generator).to(device)
    positions, mine = torch.arange(tokens, device=device)[None], packing.slice_of(tokens, rank, size)
    starts = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    shared = {"documents": attention.Documents([tokens], starts), "context_group": group}
    with answering(model):
        # (1, my tokens, vocabulary)
        whole = model(ids, position_ids=positions, use_cache=False).logits[:, mine].float()
        part = model(ids[:, mine], position_ids=positions[:, mine], **shared, use_cache=False).logits.float()
    off = (part - whole).abs().max() / whole.abs().max()
    dist.all_reduce(off, dist.ReduceOp.MAX)
    if not off <= (1e-4 if dtype == torch.float32 else 0.1):
        raise ValueError(
            f"parallel.context = {size}: in this model tokens meet outside its attention (logits are off by {off:.0%} "
            "where ranks share a row); set parallel.context=1"
        )


# ---- parallel --------------------------------------------------------------------------------------------------------


def choose_strategy(strategy: str, model, world_size: int, gpu_bytes: float | None) -> str:
    """auto: ddp where weights, gradients and Adam's two moments (16 bytes a trained weight) take at most half a GPU.
    `gpu_bytes`: memory of each GPU; None: the run is on CPUs."""
    if strategy != "auto":
        return strategy
    if world_size == 1 or gpu_bytes is None:
        return "ddp"
    needed = sum(p.numel() * (16 if p.requires_grad else p.element_size()) for p in model.parameters())
    return "ddp" if needed <= gpu_bytes / 2 else "fsdp"


def mesh_shape(replicas: int, world_size: int) -> tuple[int, int]:
    """(groups that each hold the whole model, processes that share one), for FSDP."""
    if world_size % replicas:
        raise ValueError(
            f"parallel.replicas = {replicas} does not divide the {world_size} process(es); change it, or start another "
            "number of them"
        )
    return replicas, world_size // replicas


def check_parallel(config, world_size: int):
    """Raises ValueError where so many processes cannot do what the section `parallel` asks for."""
    mesh_shape(config.parallel.replicas, world_size)
    if world_size == 1 and config.parallel.cpu_offload:
        raise ValueError("parallel.cpu_offload needs more than one process: it is a way of FSDP")


def make_mesh(replicas: int, world_size: int, device: torch.device) -> DeviceMesh:
    """The processes of FSDP: "shard" and, where there are several groups of them, "replicate" before it."""
    shape = mesh_shape(replicas, world_size)
    if replicas == 1:
        return init_device_mesh(device.type, shape[1:], mesh_dim_names=("shard",))
    mesh = torch.arange(world_size).view(shape)
    # (made here, as the groups of init_device_mesh would have a timeout of minutes)
    groups = [
        dist.new_subgroups_by_enumeration(members.tolist(), timeout=ranks.TIMEOUT)[0] for members in (mesh.T, mesh)
    ]
    return DeviceMesh.from_group(groups, device.type, mesh, mesh_dim_names=("replicate", "shard"))


def blocks(model) -> torch.nn.ModuleList:
    """The decoder's layers: what is compiled and sharded one by one."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module)]
    return max(lists, key=lambda module: sum(p.numel() for p in module.parameters()))


def check_context(config, model_config, world_size: int):
    """Raises ValueError where `parallel.context` ranks cannot share rows of this model."""
    context, heads = config.parallel.context, getattr(model_config.get_text_config(), "num_attention_heads", 0)
    if world_size % context:
        raise ValueError(
            f"parallel.context = {context} does not divide the {world_size} process(es); change it, or start another "
            "number of them"
        )
    if heads % context:
        raise ValueError(f"parallel.context = {context} does not divide the model's {heads} attention heads; change it")


def parallelise(model, config, strategy: str, world_size: int, device: torch.device, context_group=None):
    """(the `PackedLoss` to call, or DDP around it; the model in it, which holds the weights). With fsdp, ranks but the
    first need no weights of their own (an outline): they get those of rank 0, a block at a time."""
    if strategy == "fsdp":
        plain, ties = follow_rank_0(model)
    else:
        plain = has_plain_head(model.to(device))
    loss = PackedLoss(model, plain, context_group)
    if config.model.compile:
        # blocks share their code, and some differ: past the limit they would be computed uncompiled, without a word
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for block in blocks(model)[: -1 if loss.gathers else None]:  # (blocks share a graph, and the last one differs)
            block.compile(dynamic=True)
    if strategy == "fsdp":
        options = {
            "mesh": make_mesh(config.parallel.replicas, world_size, device),
            "mp_policy": MixedPrecisionPolicy(param_dtype=compute_dtype(config), reduce_dtype=torch.float32),
        }
        if config.parallel.cpu_offload:
            if device.type == "cpu":
                raise ValueError("parallel.cpu_offload needs GPUs to compute on, and there are none here")
            options["offload_policy"] = CPUOffloadPolicy()
        place = torch.device("cpu") if config.parallel.cpu_offload else device
        in_blocks = {module for block in blocks(model) for module in block.modules()}
        for block in blocks(model):
            take_weights(block.modules(), place)
            fully_shard(block, **options)
        take_weights([module for module in model.modules() if module not in in_blocks], place)
        for name, first in ties.items():
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, model.get_parameter(first))
        fully_shard(model, **options)
        # the loss does not go through model.forward: have FSDP gather what is in no block there too
        model.packed_loss = loss.forward
        register_fsdp_forward_method(model, "packed_loss")
        loss.forward = model.packed_loss
        return loss, model
    if world_size == 1:
        return loss, model
    unused = not reaches_every_weight(loss, config, device)
    parallel = DistributedDataParallel(
        loss, gradient_as_bucket_view=True, forward_sync_buffers=False, find_unused_parameters=unused
    )
    return parallel, model


def reaches_every_weight(loss, config, device: torch.device) -> bool:
    """Whether each trained weight has a gradient after a row without documents: not the image tower of a model that
    reads text alone, nor experts that no token is sent to. The same on all ranks."""
    context = config.parallel.context
    row = data.collate(None, [], device, dist.get_rank() % context, context)
    with computing_in(compute_dtype(config), loss.model):
        loss(row).backward()
    reached = all(p.grad is not None for p in loss.parameters() if p.requires_grad)
    loss.zero_grad(set_to_none=True)
    return ranks.from_rank_0(reached)


def follow_rank_0(model) -> tuple[bool, dict[str, str]]:
    """(whether the model has a plain head; the tied weights: second name to first), as found on rank 0, which has the
    weights. The outlines on the other ranks take its dtypes. Raises ValueError if their names or shapes differ."""
    found = None
    if dist.get_rank() == 0:
        names, ties = {}, {}
        for name, p in model.named_parameters(remove_duplicate=False):
            if names.setdefault(p, name) != name:
                ties[name] = names[p]
        found = has_plain_head(model), ties, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors_of(model)}
    plain, ties, contents = ranks.from_rank_0(found)
    mine = dict(tensors_of(model))
    if [(name, t.shape) for name, t in mine.items()] != [(name, shape) for name, (_, shape) in contents.items()]:
        raise ValueError(f"the weights of {model.config._name_or_path} are not those that its config.json describes")
    for name, tensor in mine.items():
        tensor.data = tensor.data.to(contents[name][0])
    return plain, ties


def tensors_of(model):
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def take_weights(modules, device: torch.device):
    """Give all ranks rank 0's weights and buffers of these modules (not of their children), on this device."""
    for module in modules:
        if dist.get_rank() == 0:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
        else:
            for name, p in [*module.named_parameters(recurse=False)]:
                empty = torch.empty(p.shape, dtype=p.dtype, device=device)
                module.register_parameter(name, torch.nn.Parameter(empty, p.requires_grad))
            for name, buffer in [*module.named_buffers(recurse=False)]:
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            dist.broadcast(tensor.detach(), src=0)


def is_sharded(model) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def compute_dtype(config) -> torch.dtype:
    return getattr(torch, config.model.dtype)


@contextlib.contextmanager
def computing_in(dtype: torch.dtype, model):
    """The model computes with copies of its weights in `dtype`, made once, while the gradients go to the weights
    themselves, which stay float32. (FSDP does the same by itself, a block at a time. Autocast would keep the sums
    between blocks in float32, and cast each product's inputs.) All weights, also those that transformers would keep in
    float32 when it opens a bfloat16 model. Raises ValueError where the model's code mixes the two."""
    kept = [
        (module._parameters, name, p)
        for module in model.modules()
        for name, p in module._parameters.items()
        if p is not None and p.is_floating_point() and p.dtype != dtype and not isinstance(p, DTensor)
    ]
    copies = {p: Cast.apply(p, dtype) for _, _, p in kept}
    for parameters, name, p in kept:
        parameters[name] = copies[p]
    try:
        yield
    except RuntimeError as error:
        if dtype == torch.float32 or not re.search("dtype|(scalar|bias|weight) type", str(error)):
            raise
        raise ValueError(
            f"model.dtype = {str(dtype)[6:]}: the code of {model.config.model_type} mixes it with float32 ({error}); "
            "set model.dtype=float32"
        ) from error
    finally:
        for parameters, name, p in kept:
            parameters[name] = p


class Cast(torch.autograd.Function):
    """A weight in another dtype. A gradient is added to the weight's own as it is: autograd would make it float32 first
    and so read and write nearly twice as much memory. (Autograd's hooks see the first row of a step alone.)"""

    @staticmethod
    def forward(ctx, weight, dtype: torch.dtype):
        ctx.weight = weight
        return weight.to(dtype)

    @staticmethod
    def backward(ctx, gradient):
        if ctx.weight.grad is None:
            return gradient.to(ctx.weight.dtype), None
        ctx.weight.grad.add_(gradient)
        return None, None


# ---- loss and optimizer ----------------------------------------------------------------------------------------------


class PackedLoss(torch.nn.Module):
    """Called with a packed row (`data.collate`): the sum of its token losses, a float32 scalar. The output layer runs
    at supervised positions alone; a row with none gives a zero that still reaches every weight. `plain_head`: see
    `has_plain_head`; `context_group`: the ranks that share the row, each with its part of it and of the loss.
    """

    def __init__(self, model, plain_head: bool, context_group=None):
        super().__init__()
        self.model, self.plain_head, self.positions, self.tokens = model, plain_head, None, 0
        self.context = {} if context_group is None else {"context_group": context_group}
        computed_again = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        self.gathers = False  # whether the last block has hooks
        if plain_head and not computed_again:
            # Nobody reads what the last block computes after its attention at the other positions. (Recomputed in the
            # backward pass, a block would no longer have the positions.)
            block = blocks(model)[-1]
            for module in (getattr(block, "mlp", None), getattr(getattr(block, "self_attn", None), "o_proj", None)):
                if goes_by_position(module, model):
                    module.register_forward_pre_hook(self.gather)
                    module.register_forward_hook(self.scatter)
                    self.gathers = True

    def forward(self, batch: dict) -> torch.Tensor:
        names = ("input_ids", "position_ids", "documents")
        arguments = {name: batch[name] for name in names} | self.context
        positions, targets = batch["positions"], batch["targets"]  # (supervised,)
        if self.plain_head:
            self.positions, self.tokens = positions, batch["input_ids"].shape[1]
            try:
                hidden = self.model.get_decoder()(**arguments, use_cache=False).last_hidden_state[0]  # (tokens, hidden)
            finally:
                self.positions = None
            weight = self.model.get_output_embeddings().weight
            return HeadLoss.apply(hidden[positions], weight, targets, torch.is_grad_enabled())
        logits = self.model(**arguments, use_cache=False, logits_to_keep=positions).logits[0]
        if len(logits) != len(positions):  # the model does not know logits_to_keep
            logits = logits[positions]  # (supervised, vocabulary)
        return F.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=IGNORE_INDEX)

    def gather(self, module, arguments):
        if self.positions is not None:
            return (arguments[0][:, self.positions],)  # (1, supervised, hidden)

    def scatter(self, module, arguments, output):
        if self.positions is not None:
            everywhere = output.new_zeros(1, self.tokens, output.shape[2])  # (1, tokens, hidden)
            return everywhere.index_copy(1, self.positions, output)


class HeadLoss(torch.autograd.Function):
    """Sum of the cross entropies of `hidden @ weight.T`: hidden (positions, hidden), weight (vocabulary, hidden),
    targets (positions,) int64, where -100 is ignored. It works in chunks of positions and takes each chunk's gradient
    while it has the logits, so that no more than LOGITS of them exist at once (as Liger's fused linear cross
    entropy: Hsu et al., 2024, https://arxiv.org/abs/2410.10989).
    """

    LOGITS = 2**27  # at once: 512 MiB in float32

    @staticmethod
    def forward(ctx, hidden, weight, targets, with_gradient: bool):
        h, w = hidden.to(weight.dtype), weight
        for_hidden, for_weight = (with_gradient and needed for needed in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(h) if for_hidden else None
        grad_weight = None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for rows in range(0, len(h), max(1, HeadLoss.LOGITS // len(w))):
            chunk = slice(rows, rows + max(1, HeadLoss.LOGITS // len(w)))
            log_p = (h[chunk] @ w.T).float().log_softmax(1)  # (chunk, vocabulary)
            counted = (targets[chunk] != IGNORE_INDEX)[:, None]  # (chunk, 1)
            index = targets[chunk, None].clamp(min=0)
            loss -= (log_p.gather(1, index) * counted).sum()
            if not (for_hidden or for_weight):
                continue
            # the gradient of the logits: softmax minus one at the target
            gradient = log_p.exp_().scatter_add_(1, index, -torch.ones_like(index, dtype=log_p.dtype))
            gradient = gradient.to(w.dtype).mul_(counted)
            if for_hidden:
                torch.mm(gradient, w, out=grad_hidden[chunk])
            if for_weight:
                part = gradient.T @ h[chunk]  # (vocabulary, hidden)
                grad_weight = part if grad_weight is None else grad_weight.float().add_(part)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    def backward(ctx, scale):
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else (grad_hidden * scale).to(ctx.dtypes[0]),
            None if grad_weight is None else grad_weight.mul_(scale).to(ctx.dtypes[1]),
            None,
            None,
        )


@torch.no_grad()
def has_plain_head(model) -> bool:
    """Whether the model's logits are its last hidden states times the output weights, with no scale, cap or bias after
    them: measured. (False is right for any head, and slower.)"""
    head, ids = model.get_output_embeddings(), torch.arange(4, device=model.device)[None]
    if head is None:
        return False
    hook = head.register_forward_hook(lambda module, arguments, output: output * 1000)  # a cap shows on large logits
    try:
        with answering(model, "eager"):  # the head is looked at, on any device
            hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            logits = model(input_ids=ids, use_cache=False).logits.float()
        plain = 1000 * (hidden @ head.weight.T).float()
    except Exception:  # some layers run only on a GPU, and some models have no such decoder
        return False
    finally:
        hook.remove()
    tolerance = {"rtol": 1e-3, "atol": 1e-4 * float(logits.abs().max())}
    return plain.shape == logits.shape and torch.allclose(plain, logits, **tolerance)


@torch.no_grad()
def goes_by_position(module, model) -> bool:
    """Whether a part of a block is an MLP or a linear layer that maps one tensor to one, position by position."""
    if not type(module).__name__.endswith(("MLP", "Linear")):
        return False
    width = getattr(module, "in_features", model.config.get_text_config().hidden_size)
    try:
        made = module(torch.zeros(1, 3, width, device=model.device, dtype=model.dtype))
    except Exception:  # it takes more than one argument
        return False
    return isinstance(made, torch.Tensor) and made.shape[:2] == (1, 3)


def make_optimizer(model, train) -> torch.optim.AdamW:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},  # norms and biases
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=tuple(train.betas), eps=train.eps, fused=True)


def first_state(p: torch.nn.Parameter) -> dict:
    """What fused AdamW knows of a weight before its first step."""
    step = torch.zeros((), dtype=torch.float32, device=p.device)
    return {"step": step, "exp_avg": torch.zeros_like(p.detach()), "exp_avg_sq": torch.zeros_like(p.detach())}


def learning_rate(train, step: int, steps: int) -> float:
    """Of step `step`, from 1, of `steps`: linear warm-up to the peak, then the schedule."""
    if step <= train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    done = (step - train.warmup_steps - 1) / max(1, steps - train.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[train.schedule]
    return train.min_learning_rate + (train.learning_rate - train.min_learning_rate) * factor


# ---- export -------------------------------------------------------------------------------------------------------


def stop_ids_of(model, tokenizer) -> list[int]:
    """Where a saved model's answers end."""
    stop = model.generation_config.eos_token_id
    stop = tokenizer.eos_token_id if stop is None else stop
    if stop is None:
        raise ValueError("neither the model nor its tokenizer says which token ends an answer (eos_token)")
    return stop if isinstance(stop, list) else [stop]


def skeleton(config, generation_config, dtype: torch.dtype, adapter: dict | None = None):
    """The model of a transformers configuration without weights (on the meta device), as it is to be saved. `adapter`:
    see `adapter_config`."""
    config = type(config).from_dict(config.to_dict())
    config.use_cache, config.dtype = True, dtype
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=dtype)
    empty.generation_config.update(**generation_config.to_diff_dict())
    if adapter:
        with torch.device("meta"):
            lora.add_adapter(empty, adapter)
    return empty


def export(empty, weights: dict, tokenizer, stop_ids: list[int], folder: Path):
    """A model folder that `from_pretrained` and serving engines open, or a PEFT adapter's. `empty`: `skeleton` of the
    model, empty again afterwards; `weights`: by name, tied ones once. Builds no model, so that it may run beside the
    training."""
    shutil.rmtree(folder, ignore_errors=True)
    missing = {name for name, p in empty.named_parameters() if p.requires_grad} - {*weights}
    tied = {name for names in (empty._tied_weights_keys or {},) for name in names}
    if {name for name in missing if not any(re.fullmatch(pattern, name) for pattern in tied)}:
        raise ValueError(f"the checkpoint lacks the weights {sorted(missing)[:3]}")
    generation = empty.generation_config
    generation.eos_token_id = stop_ids if len(stop_ids) > 1 else stop_ids[0]
    generation.pad_token_id = generation.pad_token_id if generation.pad_token_id is not None else stop_ids[0]
    tokenizer.save_pretrained(folder)
    if lora.has_adapter(empty):
        adapter = json.dumps(empty.adapter_config, indent=2) + "\n"
        (folder / "adapter_config.json").write_text(adapter, encoding="utf-8")
        save_file(
            {lora.peft_name(name): value for name, value in weights.items()}, folder / "adapter_model.safetensors"
        )
        generation.save_pretrained(folder)
    else:
        empty.load_state_dict(weights, assign=True, strict=False)
        empty.tie_weights()
        empty.save_pretrained(folder)
        empty.to("meta")
    check_files(folder)


def check_files(folder: Path):
    """Raises ValueError unless a model folder's weights are whole; gives them the permissions of the other files."""
    for name in weight_files(folder):
        check_size(folder / name)
        shutil.copymode(folder / "tokenizer_config.json", folder / name)  # safetensors: the owner only


def weight_files(folder: Path) -> list[str]:
    """The names of a model folder's safetensors files."""
    if (folder / "adapter_config.json").is_file():
        return ["adapter_model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    return ["model.safetensors"]


def check_size(path: Path):
    """Raises ValueError unless a safetensors file has as many bytes as its header says.
    https://github.com/huggingface/safetensors#format: 8 bytes length of the header, header, tensors."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise ValueError(f"{path.parent.name}/{path.name} is damaged: its header cannot be read") from None
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if path.stat().st_size != 8 + length + max(ends, default=0):
        raise ValueError(
            f"{path.parent.name}/{path.name} has {path.stat().st_size:,} bytes of {8 + length + max(ends):,}"
        )


def compare(folder: Path, weights: dict):
    """Raises RuntimeError unless the folder, opened as a user opens it, has exactly these weights, in its dtype."""
    reloaded = open_saved(folder, "auto").state_dict()
    different = [
        name
        for name, value in weights.items()
        if name not in reloaded or not torch.equal(reloaded[name], value.to(reloaded[name].dtype))
    ]
    if different:
        raise RuntimeError(f"{folder} does not hold the trained weights: {different[:3]}")
