"""Attention within the documents of a packed row, also where several ranks share the row (context parallelism).

transformers' models call it by name (`AttentionInterface`) and pass on the keyword arguments that they do not know
themselves: so `documents` and `cp_group`, given to the model by `model.PackedLoss`, arrive in `attention` below.
"""

import contextlib
import functools
import inspect
import itertools
import math

import torch
import torch.distributed as dist
import torch.nn.attention.varlen
import torch.nn.functional as F
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from packing import Documents, cp_slice

# torch 2.11 takes fewer key heads without this argument.
HAS_ENABLE_GQA = "enable_gqa" in inspect.signature(torch.nn.attention.varlen.varlen_attn).parameters


def choose(requested: str, dtype: str, model_class, device: torch.device) -> str:
    """The attention for `model.attention` and `model.dtype` on a device, by its name in transformers, or ValueError."""
    if not model_class._can_set_attn_implementation():  # An older model, which computes its attention itself.
        if requested not in ("auto", "eager"):
            raise ValueError(f"model.attention={requested}: {model_class.__name__} has only its own; set it to auto")
        return "eager"
    fits = device.type == "cuda" and dtype == "bfloat16"
    if fits and torch.cuda.is_available():  # preview.py runs without a GPU.
        fits = torch.cuda.get_device_capability(device) >= (8, 0)
    if requested == "varlen" and not fits:
        raise ValueError("model.attention=varlen needs model.dtype=bfloat16 and a GPU of compute capability >= 8.0")
    if requested == "auto":
        requested = "varlen" if fits else "sdpa"
    return {"varlen": "per_document_varlen", "sdpa": "per_document", "eager": "eager"}[requested]


def attention(
    kernel, module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None,
    s_aux=None, documents=None, cp_group=None, **kwargs,
):  # fmt: skip
    """Causal attention of each document of a packed row to itself, in a layer of a transformers model.

    query (1, heads, tokens, head_dim); key and value with as many heads or fewer. `softcap`, `s_aux` (heads,): see
    `eager_attention`. `documents`: None, the row is one document. `cp_group`: the ranks that share the row, each with
    its `packing.cp_slice` of the tokens, while `documents` is the whole row's. Returns (1, tokens, heads, head_dim),
    contiguous, and None for the scores. Raises ValueError for a model that needs more than that."""
    if documents is None:
        tokens = query.shape[2]
        documents = Documents([tokens], torch.tensor([0, tokens], dtype=torch.int32, device=query.device))
    kwargs |= {"attention_mask": attention_mask, "sliding_window": sliding_window}
    check_supported(module, kwargs, documents.longest)
    query, key = (x.to(value.dtype) for x in (query, key))  # Some rotary embeddings return float32.
    if cp_group is not None:
        query, key, value = gather_tokens_split_heads(query, key, value, documents.ends[-1], cp_group)
        if s_aux is not None:
            s_aux = s_aux.chunk(dist.get_world_size(cp_group))[dist.get_rank(cp_group)]
    if softcap or s_aux is not None:
        kernel = functools.partial(eager_attention, softcap=softcap, sinks=s_aux)
    output = kernel(query, key, value, documents, scaling or query.shape[3] ** -0.5, dropout, sliding_window)
    if cp_group is not None:
        output = gather_heads_split_tokens(output, cp_group)
    return output, None


def per_document_varlen(module, query, key, value, attention_mask, **kwargs):
    """`attention` by one call of torch's variable-length kernel, in the graph of a compiled block. CUDA, bfloat16."""
    # A call of the kernel and of nothing else is the same code whatever the documents are.
    one_kernel = kwargs.get("s_aux") is None and not any(map(kwargs.get, ("dropout", "softcap", "cp_group")))
    call = attention if one_kernel and fits_varlen(query, value) else uncompiled_attention
    return call(varlen, module, query, key, value, attention_mask, **kwargs)


uncompiled_attention = torch.compiler.disable(attention)  # The number of documents differs from row to row.


def check_supported(module, kwargs: dict, longest: int):
    """Raises ValueError where a layer needs more than causal attention within documents of up to `longest` tokens."""
    config = getattr(module, "config", None)
    chunk, window = (getattr(config, name, None) for name in ("attention_chunk_size", "sliding_window"))
    if window and kwargs["sliding_window"] is None:
        kinds = getattr(config, "layer_types", None)  # None: all layers are alike.
        if kinds is None or kinds[module.layer_idx] == "sliding_attention":
            chunk = min(chunk or window, window)  # The window is in the model's mask alone, which is not computed here.
    if chunk and longest > chunk:
        fix = f"set data.max_seq_length={chunk}, or model.attention=eager"
        raise ValueError(f"{type(module).__name__} attends to {chunk} tokens, and a document has {longest}: {fix}")
    for name in ("attention_mask", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} passes its own {name}: set model.attention=eager")


# ---- kernels: (1, heads, tokens, head_dim) to (1, tokens, heads, head_dim) -------------------------------------------
def sdpa(query, key, value, documents: Documents, scale: float, dropout: float, window: int | None):
    if query.is_cuda and (query.dtype == torch.float32 or window or not fits_varlen(query, value)):
        # There SDPA's fast kernels need as many key heads, and the slow one materializes all scores.
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))

    def attend(q, k, v):
        length = q.shape[2]  # q: (1, heads, length, head_dim)
        mask = None if window is None or length <= window else causal_mask(length, window, q.device)
        options = {"attn_mask": mask, "is_causal": mask is None, "dropout_p": dropout, "scale": scale}
        output = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)
        return output.transpose(1, 2)  # (1, length, heads, head_dim)

    return for_each_document(attend, query, key, value, documents)


def for_each_document(attend, query, key, value, documents: Documents) -> torch.Tensor:
    # By `split`, because the gradient of a slice would be a whole row of zeros for each document.
    pieces = zip(*(x.split(documents.lengths, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([attend(q, k, v) for q, k, v in pieces], dim=1)


def fits_varlen(query, value) -> bool:
    """The variable-length kernel takes a head_dim of at most 256."""
    return max(query.shape[3], value.shape[3]) <= 256


def causal_mask(length: int, window: int | None, device) -> torch.Tensor:
    """Which keys each query of a document attends to: bool (length, length)."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)


def eager_attention(
    query, key, value, documents: Documents, scale: float, dropout: float, window: int | None, softcap, sinks
) -> torch.Tensor:
    """What the other kernels do not compute. `softcap`: scores are softcap tanh(score / softcap) (Gemma 2,
    arXiv:2408.00118). `sinks` (heads,): the score of an additional key without a value, which takes its share of each
    query's attention (gpt-oss, arXiv:2508.10925). The scores are computed again in the backward pass."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))

    def attend(q, k, v):
        scores = (q @ k.transpose(2, 3)).float() * scale  # (1, heads, length, length)
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        scores = scores.masked_fill(~causal_mask(q.shape[2], window, q.device), -torch.inf)
        if sinks is not None:
            sink_scores = sinks.float()[None, :, None, None].expand(-1, -1, q.shape[2], 1)
            scores = torch.cat([scores, sink_scores], dim=3)  # (1, heads, length, length + 1)
        probabilities = F.dropout(scores.softmax(3)[..., : q.shape[2]], dropout).to(v.dtype)
        return (probabilities @ v).transpose(1, 2)  # (1, length, heads, head_dim)

    recomputed = functools.partial(checkpoint, attend, use_reentrant=False)
    return for_each_document(recomputed, query, key, value, documents)


def varlen(query, key, value, documents: Documents, scale: float, dropout: float, window: int | None):
    if dropout or not fits_varlen(query, value):
        return sdpa(query, key, value, documents, scale, dropout, window)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (tokens, heads, head_dim)
    width = v.shape[2]
    # The kernel has one head_dim for all three, in steps of 8.
    padded = -(-max(q.shape[2], width) // 8) * 8
    if {padded} != {x.shape[2] for x in (q, k, v)}:
        q, k, v = (F.pad(x, (0, padded - x.shape[2])) for x in (q, k, v))
    options = {"scale": scale, "window_size": (window - 1 if window else -1, 0)}
    if HAS_ENABLE_GQA:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    starts, longest = documents.starts, documents.longest
    varlen_attn = torch.nn.attention.varlen.varlen_attn
    return varlen_attn(q, k, v, starts, starts, longest, longest, **options)[None, ..., :width].contiguous()


per_document = functools.partial(uncompiled_attention, sdpa)  # One call for each document: any device and dtype.
# transformers refuses a name with "sdpa" or "flash" in it to models that cap their scores or have sinks.
AttentionInterface.register("per_document", per_document)
AttentionInterface.register("per_document_varlen", per_document_varlen)


# ---- context parallelism ---------------------------------------------------------------------------------------------
# Each rank of a group has a slice of a row's tokens. For attention an all-to-all gives it all tokens of some heads, and
# another one undoes that (DeepSpeed-Ulysses: arXiv:2309.14509). So the kernels above stay as they are.


def slice_lengths(tokens: int, cp_size: int) -> list[int]:
    """How many of a row's tokens each rank has."""
    slices = (cp_slice(tokens, cp_rank, cp_size) for cp_rank in range(cp_size))
    return [part.stop - part.start for part in slices]


def gather_tokens_split_heads(query, key, value, tokens: int, group):
    """Of each: (1, heads, my tokens, head_dim) to (1, my heads, tokens, head_dim)."""
    cp_size = dist.get_world_size(group)
    copies = cp_size // math.gcd(cp_size, key.shape[1])  # Ranks with the same key and value head get a copy each.
    result = []
    for x in (query, *(x.repeat_interleave(copies, dim=1) for x in (key, value))):
        x = x[0].unflatten(0, (cp_size, -1)).transpose(1, 2)  # (ranks, my tokens, heads of a rank, head_dim)
        x = all_to_all_single_autograd(x.flatten(0, 1), slice_lengths(tokens, cp_size), [x.shape[1]] * cp_size, group)
        result.append(x.transpose(0, 1)[None])  # (1, heads of this rank, tokens, head_dim)
    return result


def gather_heads_split_tokens(output, group):
    """(1, tokens, my heads, head_dim) to (1, my tokens, heads, head_dim)."""
    cp_size = dist.get_world_size(group)
    lengths = slice_lengths(output.shape[1], cp_size)
    mine = lengths[dist.get_rank(group)]
    # (ranks * my tokens, heads of this rank, head_dim)
    output = all_to_all_single_autograd(output[0], [mine] * cp_size, lengths, group)
    return output.unflatten(0, (cp_size, mine)).transpose(0, 1).flatten(1, 2)[None]


# ---- what a loaded model does with a packed row, measured before it is trained ---------------------------------------
@contextlib.contextmanager
def eval_mode(model, kernel: str | None = None):
    """Temporarily in eval mode, and with the given attention; None: with its own."""
    own, was_training = model.config._attn_implementation, model.training
    model.eval()
    try:
        model.set_attn_implementation(kernel or own)
        yield
    finally:
        model.set_attn_implementation(own)
        model.train(was_training)


def random_ids(model, *lengths: int) -> list[torch.Tensor]:
    """Token ids, (1, length) each: the same in every run."""
    generator, vocabulary = torch.Generator().manual_seed(0), model.get_input_embeddings().num_embeddings
    return [torch.randint(vocabulary, (1, length), generator=generator) for length in lengths]


@torch.no_grad()
def check_packing(model, name: str, dtype: torch.dtype, longest: int = 0) -> bool:
    """Raises ValueError unless attention is causal and a packed row gives the logits that transformers' own attention
    gives, measured in `dtype`, that of the parameters, where rounding hides nothing. Returns whether the documents of a
    row are isolated, the `longest` of which has so many tokens; True for a model that runs only on a GPU."""
    # In bfloat16, tokens may be routed to other experts by rounding alone.
    limit = 1e-3 if dtype == torch.float32 else 0.2
    (ids,) = random_ids(model, 12)
    try:
        with eval_mode(model, "eager"):
            alone = model(ids, use_cache=False).logits.float()  # (1, 12, vocabulary)
            first_half = model(ids[:, :6], use_cache=False).logits.float()
    except Exception:  # Some layers run only on a GPU.
        return True
    if not (first_half - alone[:, :6]).norm() <= limit * alone[:, :6].norm():
        raise ValueError(f"model.name = {name!r}: attention is not causal")
    # The variable-length kernel does not compute in float32.
    kernel = "eager" if model.config._attn_implementation == "eager" else "per_document"
    fix = "it cannot be trained here" if kernel == "eager" else "set model.attention=eager"
    try:
        with eval_mode(model, kernel):
            packed = model(ids, position_ids=torch.arange(12)[None], use_cache=False).logits.float()
    except Exception as error:
        raise ValueError(f"model.name = {name!r} does not take packed rows ({error!r}); {fix}") from error
    difference = (packed - alone).norm() / alone.norm()
    if not difference <= limit:
        raise ValueError(f"model.name = {name!r}: its logits differ by {difference:.1%} in a packed row; {fix}")
    return isolates_documents(model, model.device, dtype, kernel, longest)


@torch.compiler.set_stance("force_eager")  # A few short rows are not worth a graph.
@torch.no_grad()
def isolates_documents(model, device: torch.device, dtype: torch.dtype, kernel: str | None = None, longest: int = 0):
    """Whether each document of a packed row gets the logits that it gets alone, whatever stands beside it: measured on
    the loaded model, which computes in `dtype` on `device`. Every rank of a sharded model has to call it. One
    document gets the last positions of the `longest`: some rotary frequencies (longrope) depend on them."""
    second = slice(7, 19)  # of three documents: of 7, 12 and 5 tokens
    ids, other_ids = random_ids(model, 24, 24)
    other_ids[:, second] = ids[:, second]

    def logits(ids, *lengths, last=0):  # (tokens, vocabulary); `last`: where the positions of the last document begin
        position_ids = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
        position_ids[:, 24 - 5 :] += last
        ends = [*itertools.accumulate(lengths)]
        row = Documents(ends, torch.tensor([0, *ends], dtype=torch.int32, device=device))
        return model(ids.to(device), position_ids=position_ids, documents=row, use_cache=False).logits[0].float()

    with eval_mode(model, kernel):
        alone = logits(ids[:, second], 12)
        packed = logits(ids, 7, 12, 5)[second]
        beside_others = logits(other_ids, 7, 12, 5, last=max(0, longest - 5))[second]
    scale = alone.abs().max().clamp(min=1e-3)
    rounding = 1e-4 if dtype == torch.float32 else 0.1  # Rows of other lengths may take other kernels.
    leak, difference = (packed - beside_others).abs().max(), (packed - alone).abs().max()
    return bool(leak <= 1e-4 * scale and difference <= rounding * scale)
