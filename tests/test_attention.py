import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig

import attention
import packing

HEADS, TOKENS, ENDS = 6, 23, [9, 10, 23]
ROW = attention.Documents(ENDS, torch.tensor([0, *ENDS], dtype=torch.int32))


def inputs(key_heads, widths=(8, 8, 8)):
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, key_heads, key_heads)
    return [torch.randn(1, n, TOKENS, width, generator=generator) for n, width in zip(heads, widths, strict=True)]


def attended(query, key, value, ends, window, scale=8**-0.5):
    """By the definition: each query's weights over the keys of its document, of itself and before, in the window."""
    key, value = (x.repeat_interleave(HEADS // x.shape[1], dim=1) for x in (key, value))
    document, place = torch.bucketize(torch.arange(TOKENS), torch.tensor(ends), right=True), torch.arange(TOKENS)
    seen = (document[:, None] == document) & (place[:, None] >= place)
    if window:
        seen &= place[:, None] - place < window
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(3) @ value).transpose(1, 2)  # (1, tokens, heads, head_dim)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_a_token_attends_to_its_own_document_up_to_itself(key_heads, window):
    made = inputs(key_heads)
    output, _ = attention.document_sdpa(torch.nn.Module(), *made, None, sliding_window=window, documents=ROW)
    torch.testing.assert_close(output, attended(*made, ENDS, window))


CASES = [(1, None), (2, None), (2, 4), (6, None)]  # key heads, window


def one_rank(rank, path, ranks):
    """Its slice of the outputs and of the gradients, into a file."""
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=ranks)
    mine, saved, shared = packing.slice_of(TOKENS, rank, ranks), [], {"context_group": dist.group.WORLD}
    for key_heads, window in CASES:
        made = [x[:, :, mine].clone().requires_grad_() for x in inputs(key_heads)]
        output, _ = attention.document_sdpa(
            torch.nn.Module(), *made, None, sliding_window=window, documents=ROW, **shared
        )
        output.square().sum().backward()
        saved.append([output.detach(), *(x.grad for x in made)])
    torch.save(saved, f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_share_a_row_attend_as_one_alone(tmp_path, ranks):
    torch.multiprocessing.spawn(one_rank, (str(tmp_path), ranks), ranks)
    saved = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    for case, (key_heads, window) in enumerate(CASES):
        made = [x.requires_grad_() for x in inputs(key_heads)]
        output = attended(*made, ENDS, window)
        output.square().sum().backward()
        torch.testing.assert_close(torch.cat([parts[case][0] for parts in saved], dim=1), output)
        for n, x in enumerate(made, 1):
            torch.testing.assert_close(torch.cat([parts[case][n] for parts in saved], dim=2), x.grad)


def test_a_document_longer_than_a_models_attention_chunk_is_refused():
    query = torch.zeros(1, 2, 6, 4)
    module = torch.nn.Module()
    module.config = LlamaConfig(attention_chunk_size=5)
    attention.document_sdpa(module, query, query, query, None, documents=attention.Documents([5, 6], None))
    with pytest.raises(ValueError, match="chunks of 5 tokens, and a document has 6: set data.max_seq_length"):
        attention.document_sdpa(module, query, query, query, None, documents=None)


@pytest.mark.parametrize("key_heads", [2, 6])
@pytest.mark.parametrize("window", [None, 4])
def test_the_kernel_for_gpus_is_called_as_it_defines_its_arguments(monkeypatch, key_heads, window):
    """Its arguments, computed here by their definition: it runs on a GPU alone."""
    called = []

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
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
        wanted, _ = attention.document_sdpa(torch.nn.Module(), *made, None, sliding_window=window, documents=ROW)
        output, _ = attention.document_varlen(torch.nn.Module(), *made, None, sliding_window=window, documents=ROW)
        torch.testing.assert_close(output, wanted)
    with pytest.raises(ValueError, match="heads are 264 wide, and varlen's at most 256; set model.attention=sdpa"):
        attention.document_varlen(torch.nn.Module(), *inputs(key_heads, (257, 257, 8)), None, documents=ROW)
    called.clear()
    made = inputs(key_heads)
    attention.document_varlen(torch.nn.Module(), *made, None, documents=ROW)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # rotary embeddings hand over float32
        attention.document_varlen(torch.nn.Module(), *made, None, documents=ROW)
    assert called[0][1:4] == (torch.int32, [0, *ENDS], 13) and called[1][0] == torch.bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 4])
def test_on_a_gpu_both_kernels_give_the_same_output_and_gradients(window):
    results, row = [], attention.Documents(ENDS, ROW.starts.cuda())
    for kernel in (attention.document_sdpa, attention.document_varlen):
        made = [x.to("cuda", torch.bfloat16).requires_grad_() for x in inputs(2)]
        output, _ = kernel(torch.nn.Module(), *made, None, sliding_window=window, documents=row)
        output.float().square().sum().backward()
        results.append([output.detach(), *(x.grad for x in made)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
    wanted = attended(*inputs(2), ENDS, window)
    torch.testing.assert_close(results[1][0].float().cpu(), wanted, rtol=0.05, atol=0.05)
