import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig

import attention
import packing

HEADS, TOKENS, ENDS = 6, 23, [9, 10, 23]
ROW = packing.Documents(ENDS, torch.tensor([0, *ENDS], dtype=torch.int32))


def inputs(key_heads, widths=(8, 8, 8)):
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, key_heads, key_heads)
    return [torch.randn(1, n, TOKENS, width, generator=generator) for n, width in zip(heads, widths, strict=True)]


def attended(query, key, value, ends, window, scale=8**-0.5, softcap=None, s_aux=None):
    """By the definition: each query's weights over the keys of its document, of itself and before, in the window, and
    over a sink, which has no value."""
    key, value = (x.repeat_interleave(HEADS // x.shape[1], dim=1) for x in (key, value))
    document, place = torch.bucketize(torch.arange(TOKENS), torch.tensor(ends), right=True), torch.arange(TOKENS)
    seen = (document[:, None] == document) & (place[:, None] >= place)
    if window:
        seen &= place[:, None] - place < window
    scores = query @ key.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, -torch.inf).exp()
    total = weights.sum(3, keepdim=True) + (0 if s_aux is None else s_aux.exp()[None, :, None, None])
    return (weights / total @ value).transpose(1, 2)  # (1, tokens, heads, head_dim)


SINKS = torch.linspace(-2.0, 2.0, HEADS)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_a_token_attends_to_its_own_document_up_to_itself(key_heads, window):
    made = inputs(key_heads)
    output, _ = attention.per_document(torch.nn.Module(), *made, None, sliding_window=window, documents=ROW)
    torch.testing.assert_close(output, attended(*made, ENDS, window))
    assert output.is_contiguous()


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("more", [{"softcap": 0.5}, {"s_aux": SINKS}, {"softcap": 0.5, "s_aux": SINKS}])
@pytest.mark.parametrize("kernel", [attention.per_document, attention.per_document_varlen])
def test_scores_are_capped_and_sinks_take_their_share(kernel, more, window):
    made = inputs(2)
    output, _ = kernel(torch.nn.Module(), *made, None, sliding_window=window, documents=ROW, **more)
    torch.testing.assert_close(output, attended(*made, ENDS, window, **more))
    assert not torch.allclose(output, attended(*made, ENDS, window), atol=1e-3) and output.is_contiguous()


def test_no_capped_scores_are_kept_for_the_backward_pass():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape[-2:]) or x, lambda x: x):
        made = [x.requires_grad_() for x in inputs(2)]
        attention.per_document(torch.nn.Module(), *made, None, documents=ROW, softcap=0.5, s_aux=SINKS)
    longest = max(ROW.lengths)
    assert kept and (longest, longest) not in kept and (longest, longest + 1) not in kept


# key heads, window, sinks
CASES = [(1, None, None), (2, None, None), (2, 4, None), (6, None, None), (2, None, SINKS)]


def one_rank(rank, path, ranks):
    """Its slice of the outputs and of the gradients, into a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=ranks)
    mine, saved, shared = packing.cp_slice(TOKENS, rank, ranks), [], {"cp_group": dist.group.WORLD}
    for key_heads, window, sinks in CASES:
        made = [x[:, :, mine].clone().requires_grad_() for x in inputs(key_heads)]
        sinks = None if sinks is None else sinks.clone().requires_grad_()
        output, _ = attention.per_document(
            torch.nn.Module(), *made, None, sliding_window=window, s_aux=sinks, documents=ROW, **shared
        )
        output.square().sum().backward()
        saved.append([output.detach(), *(x.grad for x in made), None if sinks is None else sinks.grad])
    torch.save(saved, f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_share_a_row_attend_as_one_alone(tmp_path, ranks):
    torch.multiprocessing.start_processes(one_rank, (str(tmp_path), ranks), ranks, start_method="fork")
    saved = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    for case, (key_heads, window, sinks) in enumerate(CASES):
        made = [x.requires_grad_() for x in inputs(key_heads)]
        sinks = None if sinks is None else sinks.clone().requires_grad_()
        output = attended(*made, ENDS, window, s_aux=sinks)
        output.square().sum().backward()
        torch.testing.assert_close(torch.cat([parts[case][0] for parts in saved], dim=1), output)
        for n, x in enumerate(made, 1):
            torch.testing.assert_close(torch.cat([parts[case][n] for parts in saved], dim=2), x.grad)
        if sinks is not None:
            torch.testing.assert_close(sum(parts[case][4] for parts in saved), sinks.grad)


def test_a_document_longer_than_a_models_attention_chunk_is_refused():
    query = torch.zeros(1, 2, 6, 4)
    module = torch.nn.Module()
    module.config = LlamaConfig(attention_chunk_size=5)
    attention.per_document(module, query, query, query, None, documents=packing.Documents([5, 6], None))
    with pytest.raises(ValueError, match="6: set data.max_seq_length=5"):
        attention.per_document(module, query, query, query, None, documents=None)


@pytest.mark.parametrize("key_heads", [2, 6])
@pytest.mark.parametrize("window", [None, 4])
def test_the_kernel_for_gpus_is_called_as_it_defines_its_arguments(monkeypatch, key_heads, window):
    """Its arguments, computed here by their definition: it runs on a GPU alone."""
    called = []

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=None):
        enable_gqa = query.shape[1] != key.shape[1] if enable_gqa is None else enable_gqa  # torch 2.11 has no such
        called.append((query.dtype, cu_seq_q.dtype, cu_seq_q.tolist(), max_q, window_size, enable_gqa))
        assert cu_seq_k is cu_seq_q and max_k == max_q
        left, right = window_size
        assert right == 0 and enable_gqa == (query.shape[1] != key.shape[1])
        assert query.shape[2] == key.shape[2] == value.shape[2] in (8, 16)
        back = [x.transpose(0, 1)[None] for x in (query, key, value)]
        return attended(*back, cu_seq_q[1:].tolist(), left + 1 if left >= 0 else None, scale)[0]

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    for widths in [(8, 8, 8), (6, 6, 6), (12, 12, 5), (5, 5, 12)]:
        made = inputs(key_heads, widths)
        wanted, _ = attention.per_document(torch.nn.Module(), *made, None, sliding_window=window, documents=ROW)
        output, _ = attention.per_document_varlen(torch.nn.Module(), *made, None, sliding_window=window, documents=ROW)
        torch.testing.assert_close(output, wanted)
    called.clear()
    wide = inputs(key_heads, (257, 257, 8))  # more than the kernel takes
    output, _ = attention.per_document_varlen(torch.nn.Module(), *wide, None, documents=ROW)
    torch.testing.assert_close(output, attended(*wide, ENDS, None, 257**-0.5))
    assert not called
    made = inputs(key_heads)
    attention.per_document_varlen(torch.nn.Module(), *made, None, documents=ROW)
    made[2] = made[2].bfloat16()  # some rotary embeddings hand over float32
    attention.per_document_varlen(torch.nn.Module(), *made, None, documents=ROW)
    assert called[0][1:4] == (torch.int32, [0, *ENDS], 13) and called[1][0] == torch.bfloat16
