"""Attention within the documents of a packed row, also where several ranks share the row (context parallelism)."""

import functools
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

import packing


@torch.compiler.disable  # the number of documents differs from row to row
def per_document(module, query, key, value, attention_mask, **kwargs):
    """Causal attention of each document of a packed row to itself, by SDPA, called once per document: any device and
    dtype. Registered with transformers: `attend` has the arguments."""
    return attend(sdpa, module, query, key, value, attention_mask, **kwargs), None


def per_document_varlen(module, query, key, value, attention_mask, **kwargs):
    """The same in one call of torch's variable-length flash attention, which a compiled block has in its one graph:
    CUDA, bfloat16."""
    call = attend if is_one_call(query, value, **kwargs) else uncompiled_attend
    return call(varlen, module, query, key, value, attention_mask, **kwargs), None


def is_one_call(query, value, dropout=0.0, softcap=None, s_aux=None, context_group=None, **others) -> bool:
    """Whether `attend` calls the variable-length kernel and nothing else, whatever the documents are."""
    return takes_width(query, value) and not (dropout or softcap or s_aux is not None or context_group is not None)


def takes_width(query, value) -> bool:
    """Whether the variable-length kernel does: its head_dim is at most 256."""
    return max(query.shape[3], value.shape[3]) <= 256


# (transformers refuses a name with "sdpa" or "flash" in it to models that cap their scores or have sinks)
AttentionInterface.register("per_document", per_document)
AttentionInterface.register("per_document_varlen", per_document_varlen)


def choose(config, model_class, device: torch.device) -> str:
    """The attention of a `config.Model` on a device, by its name in transformers. Raises ValueError."""
    if not model_class._can_set_attn_implementation():  # an older model, with an attention of its own alone
        if config.attention not in ("auto", "eager"):
            raise ValueError(
                f"model.attention={config.attention}: {model_class.__name__} computes its attention itself; auto and "
                "eager leave it to that"
            )
        return "eager"
    here = torch.cuda.is_available()  # (preview.py asks for GPUs that are elsewhere)
    fits = device.type == "cuda" and config.dtype == "bfloat16"
    fits = fits and not (here and torch.cuda.get_device_capability(device) < (8, 0))
    if config.attention == "varlen" and not fits:
        raise ValueError(
            "model.attention=varlen needs model.dtype=bfloat16 and a GPU of compute capability 8.0 (Ampere) or newer; "
            "auto chooses what fits"
        )
    return {
        "auto": "per_document_varlen" if fits else "per_document",
        "varlen": "per_document_varlen",
        "sdpa": "per_document",
        "eager": "eager",
    }[config.attention]


class Documents:
    """Where the documents of a packed row are: `ends`, a list of their ends; `starts`, 0 and the ends, int32
    (documents + 1,), on the model's device; `lengths` and the `longest` of them follow. (No tuple and no tensor: FSDP
    would move the ends to the GPU, and reading them there waits for all that is queued; and a compiled block would be
    compiled anew for each number of them.)"""

    def __init__(self, ends: list[int], starts: torch.Tensor):
        self.ends, self.starts = ends, starts
        self.lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        self.longest = max(self.lengths)


def attend(
    kernel, module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None,
    s_aux=None, documents=None, context_group=None, **others,
) -> torch.Tensor:  # fmt: skip
    """query (1, heads, tokens, head_dim); key and value with as many heads or fewer. `softcap`, `s_aux` (heads,): see
    `scores`. `documents`: None, the row is one. `context_group`: the ranks that share the row; each brings its
    `packing.slice_of` the tokens, while the documents are the whole row's. Returns (1, tokens, heads, head_dim),
    contiguous. Raises ValueError for a model that needs more than that.
    """
    if documents is None:
        tokens = query.shape[2]
        documents = Documents([tokens], torch.tensor([0, tokens], dtype=torch.int32, device=query.device))
    others |= {"attention_mask": attention_mask, "sliding_window": sliding_window}
    refuse_unknown(module, others, documents.longest)
    query, key = (x.to(value.dtype) for x in (query, key))  # some rotary embeddings have made float32 of them
    if context_group is not None:
        query, key, value = tokens_for_heads(query, key, value, documents.ends[-1], context_group)
        if s_aux is not None:
            s_aux = s_aux.chunk(dist.get_world_size(context_group))[dist.get_rank(context_group)]
    if softcap or s_aux is not None:
        kernel = functools.partial(scores, softcap=softcap, sinks=s_aux)
    output = kernel(query, key, value, documents, scaling or query.shape[3] ** -0.5, dropout, sliding_window)
    return output if context_group is None else heads_for_tokens(output, context_group)


uncompiled_attend = torch.compiler.disable(attend)


def refuse_unknown(module, others: dict, longest: int):
    """Raises ValueError where a model asks for more than causal attention of documents of up to `longest` tokens."""
    config = getattr(module, "config", None)
    chunk, window = (getattr(config, name, None) for name in ("attention_chunk_size", "sliding_window"))
    if window and others["sliding_window"] is None and longest > window and is_in_window(module, config):
        raise ValueError(
            f"{type(module).__name__} attends to the last {window:,} tokens by its mask alone, and a document has "
            f"{longest:,}: set data.max_seq_length to as many, or model.attention=eager"
        )
    if chunk and longest > chunk:
        raise ValueError(
            f"{type(module).__name__} attends in chunks of {chunk:,} tokens, and a document has {longest:,}: set "
            "data.max_seq_length to as many, or model.attention=eager"
        )
    for name in ("attention_mask", "position_bias"):
        if others.get(name) is not None:
            raise ValueError(f"{type(module).__name__} brings its own {name}, which only model.attention=eager applies")


def is_in_window(module, config) -> bool:
    """Whether this layer uses the sliding window that its model has."""
    kinds = getattr(config, "layer_types", None)  # None: all layers are alike
    return kinds is None or kinds[module.layer_idx] == "sliding_attention"


# ---- kernels: (1, heads, tokens, head_dim) to (1, tokens, heads, head_dim) -------------------------------------------


def sdpa(query, key, value, documents: Documents, scale: float, dropout: float, window: int | None):
    if query.is_cuda and (query.dtype == torch.float32 or window or max(query.shape[3], value.shape[3]) > 256):
        # there SDPA's fast kernels want as many key heads, and the slow one keeps a matrix of all scores
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))

    def attended(q, k, v):
        length = q.shape[2]  # q (1, heads, length, head_dim)
        mask = None if window is None or length <= window else seen(length, window, q.device)
        options = {"attn_mask": mask, "is_causal": mask is None, "dropout_p": dropout, "scale": scale}
        output = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)
        return output.transpose(1, 2)  # (1, length, heads, head_dim)

    return of_each_document(attended, query, key, value, documents)


def of_each_document(attended, query, key, value, documents: Documents) -> torch.Tensor:
    # (split: the gradient of slices would be a whole row of zeros for each document)
    parts = zip(*(x.split(documents.lengths, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([attended(q, k, v) for q, k, v in parts], dim=1)


def seen(length: int, window: int | None, device) -> torch.Tensor:
    """Which keys each query of a document sees: bool (length, length)."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)


def scores(
    query, key, value, documents: Documents, scale: float, dropout: float, window: int | None, softcap, sinks
) -> torch.Tensor:
    """What the other kernels do not compute. `softcap`: where scores end, as softcap tanh(score / softcap) (Gemma 2,
    arXiv:2408.00118); `sinks` (heads,): the score of no key at all, which takes its share of each query's weights
    (gpt-oss, arXiv:2508.10925). The backward pass computes the scores again, so that those of one document at a time
    are in memory."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))

    def attended(q, k, v):
        of_keys = (q @ k.transpose(2, 3)).float() * scale  # (1, heads, length, length)
        if softcap:
            of_keys = softcap * (of_keys / softcap).tanh()
        of_keys = of_keys.masked_fill(~seen(q.shape[2], window, q.device), -torch.inf)
        if sinks is not None:
            of_nothing = sinks.float()[None, :, None, None].expand(-1, -1, q.shape[2], 1)
            of_keys = torch.cat([of_keys, of_nothing], dim=3)  # (1, heads, length, length + 1)
        weights = F.dropout(of_keys.softmax(3)[..., : q.shape[2]], dropout).to(v.dtype)
        return (weights @ v).transpose(1, 2)  # (1, length, heads, head_dim)

    again = functools.partial(checkpoint, attended, use_reentrant=False)
    return of_each_document(again, query, key, value, documents)


def varlen(query, key, value, documents: Documents, scale: float, dropout: float, window: int | None):
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (tokens, heads, head_dim)
    width = v.shape[2]
    padded = -(-max(q.shape[2], width) // 8) * 8  # the kernel has one head_dim for all three, in steps of 8
    if dropout or not takes_width(query, value):  # which it does not compute
        return sdpa(query, key, value, documents, scale, dropout, window)
    if {padded} != {x.shape[2] for x in (q, k, v)}:
        q, k, v = (F.pad(x, (0, padded - x.shape[2])) for x in (q, k, v))
    options = {"scale": scale, "window_size": (window - 1 if window else -1, 0)}
    options["enable_gqa"] = q.shape[1] != k.shape[1]
    starts, longest = documents.starts, documents.longest
    return varlen_attn(q, k, v, starts, starts, longest, longest, **options)[None, ..., :width].contiguous()


# ---- context parallelism ---------------------------------------------------------------------------------------------
#
# Each rank of a group has a slice of a row's tokens, for everything but attention. For that they trade: each gets all
# tokens for some of the heads, and gives them back (DeepSpeed-Ulysses: Jacobs et al., 2023, arXiv:2309.14509). So the
# kernels above stay as they are, and all ranks have the same work, wherever documents begin and end.


def shares(tokens: int, ranks: int) -> list[int]:
    """How many of a row's tokens each rank has."""
    slices = [packing.slice_of(tokens, rank, ranks) for rank in range(ranks)]
    return [mine.stop - mine.start for mine in slices]


def tokens_for_heads(query, key, value, tokens: int, group):
    """Of each: (1, heads, my tokens, head_dim) to (1, my heads, tokens, head_dim)."""
    ranks = dist.get_world_size(group)
    copies = ranks // math.gcd(ranks, key.shape[1])  # of key and value heads that ranks have in common
    traded = []
    for x in (query, *(x.repeat_interleave(copies, dim=1) for x in (key, value))):
        x = x[0].unflatten(0, (ranks, -1)).transpose(1, 2)  # (ranks, my tokens, heads of a rank, head_dim)
        x = Trade.apply(x.flatten(0, 1), [x.shape[1]] * ranks, shares(tokens, ranks), group)
        traded.append(x.transpose(0, 1)[None])  # (1, heads of this rank, tokens, head_dim)
    return traded


def heads_for_tokens(output, group):
    """(1, tokens, my heads, head_dim) to (1, my tokens, heads, head_dim)."""
    ranks = dist.get_world_size(group)
    all_shares = shares(output.shape[1], ranks)
    mine = all_shares[dist.get_rank(group)]
    output = Trade.apply(output[0], all_shares, [mine] * ranks, group)  # (ranks * my tokens, heads of a rank, head_dim)
    return output.unflatten(0, (ranks, mine)).transpose(0, 1).flatten(1, 2)[None]


class Trade(torch.autograd.Function):
    """All-to-all: of x, cut along its first dimension into `sent` pieces, the i-th goes to rank i, which sends one of
    `received[i]`. The gradient goes back the same way."""

    @staticmethod
    def forward(ctx, x, sent: list[int], received: list[int], group):
        ctx.sent, ctx.received, ctx.group = sent, received, group
        output = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(output, x.contiguous(), received, sent, group=group)
        return output

    @staticmethod
    def backward(ctx, gradient):
        return Trade.apply(gradient, ctx.received, ctx.sent, ctx.group), None, None, None
