import copy
import functools
import json
import math

import architectures
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
)

import attention
import config
import export
import model as modeling
import packing
import train_sft

CFG = config.load(None, ["model.dtype=float32"])
CPU = torch.device("cpu")


class Examples:
    """Random conversations of these lengths, whose last tokens are trained: `trained_tokens` of each."""

    def __init__(self, lengths, supervised):
        generator = np.random.default_rng(0)
        self.lengths, self.trained_tokens = np.array(lengths), np.array(supervised)
        self.ids = [generator.integers(0, 64, length).astype(np.int32) for length in lengths]

    def __getitem__(self, i):
        labels = self.ids[i].copy()
        labels[: self.lengths[i] - self.trained_tokens[i]] = -100
        return self.ids[i], labels


def tiny_llama(tied=False):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = LlamaConfig(vocab_size=64, num_key_value_heads=2, tie_word_embeddings=tied, **shape)
    return LlamaForCausalLM._from_config(made, dtype=torch.float32, attn_implementation="per_document")


def gradients(rank, world_size, rows_of_ranks, examples):
    model = tiny_llama()
    loss = modeling.PackedLoss(model, plain_head=True)
    parallel = DistributedDataParallel(loss) if world_size > 1 else loss
    batches = [packing.collate(examples, row) for row in rows_of_ranks[rank]]
    train_sft.forward_backward(parallel, batches, world_size / int(examples.trained_tokens.sum()))
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def one_rank(rank, path, compute, *arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    torch.save(compute(rank, 2, *arguments), f"{path}/{rank}.pt")
    dist.destroy_process_group()


def test_a_loss_that_is_scaled_afterwards_is_refused():
    loss = modeling.PackedLoss(tiny_llama(), plain_head=True)
    value = loss(packing.collate(Examples([40, 9, 23], [31, 2, 1]), [0, 1]))
    with pytest.raises(RuntimeError, match="give PackedLoss the scale"):
        (0.5 * value).backward()


@pytest.mark.parametrize("rows", [[[0, 1, 2]], [[0], [1, 2]], [[2], [0, 1], []]])
def test_padding_at_the_end_of_a_row_changes_neither_loss_nor_gradients(rows):
    examples, results = Examples([40, 9, 23], [31, 2, 1]), []
    for multiple in (1, 128):
        model = tiny_llama()
        loss = modeling.PackedLoss(model, plain_head=True)
        batches = [packing.collate(examples, row, multiple=multiple) for row in rows]
        losses = train_sft.forward_backward(loss, batches, 0.3)
        results.append(torch.cat([losses.sum()[None], *(p.grad.flatten() for p in model.parameters())]))
    for batch in batches:
        assert batch["input_ids"].shape[1] % 128 == 0 and len(batch["targets"]) % 64 == 0
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows_of_ranks",
    [[[[0, 1]], [[2]]], [[[0], [2]], [[1], []]], [[[0, 1, 2]], [[]]]],
    ids=["uneven tokens", "an empty row", "a rank with nothing to train"],
)
def test_two_ranks_give_the_gradient_of_one(tmp_path, rows_of_ranks):
    examples = Examples([40, 9, 23], [31, 2, 1])
    arguments = (tmp_path, gradients, rows_of_ranks, examples)
    torch.multiprocessing.start_processes(one_rank, arguments, 2, start_method="fork")
    single = gradients(0, 1, [[[0, 1, 2]]], examples)
    for rank in range(2):
        two = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.isfinite(two).all()
        assert (two - single).norm() / single.norm() < 1e-6


def test_the_loss_of_a_packed_row_is_the_sum_of_its_documents_losses():
    examples, model = Examples([12, 30, 5], [4, 30, 3]), tiny_llama()
    loss = modeling.PackedLoss(model, plain_head=True)
    packed = loss(packing.collate(examples, [2, 0, 1]))
    separate = sum(loss(packing.collate(examples, [i])) for i in range(3))
    plain = 0.0  # and equal to transformers' own loss, with sdpa
    model.set_attn_implementation("sdpa")
    for i in range(3):
        ids, labels = (torch.tensor(x[None].astype(np.int64)) for x in examples[i])
        plain += model(ids, labels=labels).loss.item() * int((labels[:, 1:] != -100).sum())
    assert float(packed) == pytest.approx(float(separate), rel=1e-6)
    assert float(packed) == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("kernel", ["per_document", "per_document_varlen"])
def test_a_step_waits_for_no_number_of_the_gpu(kernel):
    """Fake tensors have no numbers, and raise where one is read. (The kernel for GPUs has a fake of its own.)"""
    examples = Examples([40, 9, 23], [31, 2, 1])
    with FakeTensorMode():
        model = tiny_llama()
        model.set_attn_implementation(kernel)
        loss, optimizer = modeling.PackedLoss(model, plain_head=True), train_sft.make_optimizer(model, CFG.train)
        with modeling.cast_params(model, torch.bfloat16):
            batches = [packing.collate(examples, row) for row in ([0, 1], [2], [])]
            losses = train_sft.forward_backward(loss, batches, 0.1)
        norm = train_sft.clip_grad_norm(model, 1.0)
        optimizer.step()
        for unknown in (losses[0], norm):
            with pytest.raises(DataDependentOutputException):
                float(unknown)


def varlen_on_a_cpu(q, k, v, starts, _, longest, __, scale, window_size, enable_gqa=True):
    """What torch's kernel computes, q (tokens, heads, head_dim)."""
    place = torch.arange(len(q))
    document, back = torch.bucketize(place, starts[1:], right=True), place[:, None] - place
    seen = (document[:, None] == document) & (back >= 0) & (back < longest)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=enable_gqa)[0].transpose(0, 1)


@pytest.mark.slow
def test_one_graph_of_a_block_holds_its_attention_for_any_documents(monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_on_a_cpu)
    model, lengths = tiny_llama(), [16, 9, 30, 12, 10, 11, 40, 50]
    model.set_attn_implementation("per_document_varlen")
    loss, examples = modeling.PackedLoss(model, plain_head=True), Examples(lengths, [4] * 8)

    def losses_and_gradients():
        made = []
        for row in ([0, 1], [2, 3, 4], [5], [0, 3, 4, 6, 7], [7, 1], [0], [4, 5]):
            value = loss(packing.collate(examples, row))
            value.backward()
            made += [value.detach()[None], *(p.grad.flatten() for p in model.parameters())]
            model.zero_grad(set_to_none=True)
        return torch.cat(made)

    wanted, counter = losses_and_gradients(), CompileCounterWithBackend("eager")
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend=counter))
    modeling.compile_blocks(model, loss)
    torch.testing.assert_close(losses_and_gradients(), wanted)
    assert all("at_loss_positions" in reason for reason in torch._dynamo.utils.counters["graph_break"])
    assert counter.frame_count <= 9  # of blocks and of the last one's parts, for one document and for more


def test_blocks_are_compiled_by_default_only_where_it_pays_and_can_be(monkeypatch):
    model = tiny_llama()
    assert not modeling.is_compiled(model, None) and modeling.is_compiled(model, True)
    model.set_attn_implementation("per_document_varlen")
    monkeypatch.setenv("CC", "cc")
    assert modeling.is_compiled(model, None) and not modeling.is_compiled(model, False)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert not modeling.is_compiled(model, None)


def test_compiled_code_is_cached_for_one_kind_of_processor(monkeypatch):
    monkeypatch.setattr(torch.compiler.config, "cache_key_tag", "")
    modeling.parallelize(tiny_llama(), config.load(None, ["model.compile=true"]), "ddp", 1, CPU)
    assert torch.backends.cpu.get_cpu_capability() in torch.compiler.config.cache_key_tag


@pytest.mark.parametrize("tied", [True, False])
def test_cast_parameters_compute_in_bfloat16_with_float32_gradients(tied):
    model, ids = tiny_llama(tied), torch.arange(8)[None]
    before = dict(model.named_parameters(remove_duplicate=False))
    rounded = copy.deepcopy(model)
    for p in rounded.parameters():  # Not the buffers: rotary frequencies stay float32.
        p.data = p.data.bfloat16()
    for made in (model, rounded):
        with modeling.cast_params(made, torch.bfloat16):
            assert made.dtype == torch.bfloat16
            for part in (ids, ids + 1):  # two rows add up
                made(ids, labels=part).loss.backward()
    with modeling.cast_params(model, torch.bfloat16):
        assert torch.equal(model(ids).logits, rounded(ids).logits)
    assert dict(model.named_parameters(remove_duplicate=False)) == before
    for (name, p), other in zip(model.named_parameters(), rounded.parameters(), strict=True):
        assert p.grad.dtype == torch.float32, name
        torch.testing.assert_close(p.grad, other.grad.float(), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_in_chunks_has_the_gradients_of_the_whole_matrix(monkeypatch, tied, dtype):
    examples = Examples([40, 9, 23], [31, 2, 1])
    losses, gradients = [], []
    for plain_head, logits in ((False, 2**26), (True, 2**26), (True, 64 * 5)):
        monkeypatch.setattr(modeling.HeadLoss, "LOGITS", logits)
        model = tiny_llama(tied)
        assert modeling.has_plain_head(model)
        loss = modeling.PackedLoss(model, plain_head)
        with modeling.cast_params(model, dtype):
            value = loss(packing.collate(examples, [0, 1, 2]), 0.3)
        value.backward()
        with torch.no_grad(), modeling.cast_params(model, dtype):
            assert torch.equal(loss(packing.collate(examples, [0, 1, 2]), 0.3), value.detach())
            assert loss(packing.collate(examples, [0, 1, 2])).item() * 0.3 == pytest.approx(value.item(), rel=1e-3)
        losses.append(value.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    rounded = dtype == torch.bfloat16
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-2 if rounded else 1e-6)
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() / gradients[0].norm() < (2e-2 if rounded else 1e-6)


def test_a_head_with_a_cap_a_scale_or_a_bias_is_left_to_the_model():
    examples = Examples([40, 9], [31, 2])
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "eager"}
    for made in (
        Gemma2Config(**shape, final_logit_softcapping=30.0, pad_token_id=0),
        GraniteConfig(**shape, logits_scaling=8.0, pad_token_id=0),
    ):
        model = AutoModelForCausalLM.from_config(made)
        assert not modeling.has_plain_head(model)
        loss = modeling.PackedLoss(model, plain_head=False)
        wanted = 0.0
        for i in range(2):
            ids, labels = (torch.tensor(x[None].astype(np.int64)) for x in examples[i])
            wanted += model(ids, labels=labels).loss.item() * int((labels[:, 1:] != -100).sum())
        assert sum(loss(packing.collate(examples, [i])).item() for i in range(2)) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    "made",
    [
        BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.1),
        Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=8),
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4),
    ],
    ids=["Bloom", "Qwen3", "GPT-2"],
)  # fmt: skip
def test_positions_that_the_last_block_skips_change_no_gradient(made):
    examples, gradients = Examples([40, 9, 23], [31, 2, 1]), []
    for plain_head in (True, False):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
        assert modeling.has_plain_head(model)
        modeling.PackedLoss(model, plain_head)(packing.collate(examples, [0])).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 1e-6


def test_documents_are_kept_apart_and_a_leak_is_found():
    model = tiny_llama()
    assert attention.isolates_documents(model, model.device, torch.float32)
    model.set_attn_implementation("leaking")
    assert not attention.isolates_documents(model, model.device, torch.float32)


@pytest.mark.parametrize("rope_type", architectures.ROTARY)
def test_long_documents_that_turn_others_by_other_frequencies_are_found(rope_type):
    apart = []
    for longest in (0, 64, 65):
        model = architectures.rotary_model("qwen3", rope_type)
        apart.append(attention.check_packing(model, "small", torch.float32, longest))
    assert apart == [True, True, rope_type not in ("dynamic", "longrope")]


@pytest.mark.parametrize("rope_type, longest", [("default", 129), ("longrope", 129), ("dynamic", 65)])
def test_conversations_beyond_rotary_positions_are_reported_or_refused(rope_type, longest):
    model, tokenizer = architectures.rotary_model("qwen3", rope_type), range(64)
    assert modeling.check_model(model, CFG, 1, tokenizer, longest - 1) == []
    if rope_type == "dynamic":  # It remembers the longest row.
        with pytest.raises(ValueError, match="data.max_seq_length=64"):
            modeling.check_model(model, CFG, 1, tokenizer, longest)
    else:
        (note,) = modeling.check_model(model, CFG, 1, tokenizer, longest)
        assert f"{longest} tokens" in note and "max_position_embeddings" in note


@pytest.mark.parametrize("model_type", ["mllama", "emu3"])
def test_a_model_that_could_not_be_opened_again_is_refused(model_type):
    with pytest.raises(ValueError, match=model_type):
        modeling.model_class("small", architectures.small(model_type))


def leaking(module, query, key, value, attention_mask, **kwargs):
    return attention.per_document(module, query, key, value, None, **{**kwargs, "documents": None})


AttentionInterface.register("leaking", leaking)


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_opens_with_equal_logits(tmp_path, tied):
    tokenizer = AutoTokenizer.from_pretrained("configs/quickstart")
    model = tiny_llama(tied)
    empty = export.meta_model(model.config, model.generation_config, torch.float32)
    export.export(empty, dict(model.named_parameters()), tokenizer, [3, 5], tmp_path / "model")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="per_document")
    ids = torch.arange(20)[None]
    assert torch.equal(reloaded(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    ends = json.loads((tmp_path / "model/generation_config.json").read_text())["eos_token_id"]
    assert ends == [3, 5, 2]  # 2: the base's own
    saved = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert saved.chat_template == tokenizer.chat_template


def test_the_learning_rate_is_a_function_of_the_step():
    train = config.load(None, ["train.schedule=linear", "train.warmup_steps=2", "train.learning_rate=1.0"]).train
    assert [train_sft.learning_rate(train, k, 6) for k in range(1, 7)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    train.schedule, train.min_learning_rate = "cosine", 0.2
    assert train_sft.learning_rate(train, 5, 6) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 2)) / 2)


def test_norms_and_biases_have_no_weight_decay():
    groups = train_sft.make_optimizer(tiny_llama(), CFG.train).param_groups
    assert all(p.ndim < 2 for group in groups if group["weight_decay"] == 0 for p in group["params"])
    assert all(p.ndim >= 2 for group in groups if group["weight_decay"] > 0 for p in group["params"])


def test_an_output_layer_that_saving_would_lose_is_refused(tmp_path):
    model = tiny_llama(tied=False)
    model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path, state_dict={name: value + 0 for name, value in model.state_dict().items()})
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + 1}, tmp_path / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    cfg = config.load(None, ["model.dtype=float32", f"model.name={tmp_path}"]).model
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        modeling.load_model(cfg, CPU)


def test_parameters_are_restored_after_an_error_in_bfloat16():
    model = architectures.random_model(architectures.small("openai-gpt"), "eager")  # Its code mixes dtypes.
    before = dict(model.named_parameters())
    with pytest.raises(RuntimeError, match="type"), modeling.cast_params(model, torch.bfloat16):
        model(torch.arange(4)[None])
    assert dict(model.named_parameters()) == before


def test_own_position_numbers_are_noticed_before_rounding_hides_them():
    model = architectures.random_model(architectures.small("blenderbot-small"), "per_document")
    assert not attention.check_packing(model, "small", torch.float32)
    with modeling.cast_params(model, torch.bfloat16):
        assert attention.isolates_documents(model, CPU, torch.bfloat16)


def in_bfloat16(rank, world_size, strategy):
    """Losses and gradients of two steps, of four rows over all ranks."""
    cfg = config.load(None, ["model.dtype=bfloat16"])
    loss, model = modeling.parallelize(tiny_llama(), cfg, strategy, world_size, CPU)
    examples, made = Examples([40, 9, 23, 30], [31, 2, 1, 20]), []
    batches = [packing.collate(examples, row) for row in [[0], [1], [2], [3]][rank::world_size]]
    for _ in range(2):
        with modeling.cast_params(model, torch.bfloat16):
            losses = train_sft.forward_backward(loss, batches, world_size * 0.1)
        if world_size > 1:
            dist.all_reduce(losses)
        grads = [p.grad.full_tensor() if strategy == "fsdp" else p.grad for p in model.parameters()]
        assert {g.dtype for g in grads} == {torch.float32}
        made += [losses.sum()[None] / world_size, *(g.flatten() for g in grads)]
        model.zero_grad(set_to_none=True)
    return torch.cat(made)


@pytest.mark.slow
def test_in_bfloat16_ddp_and_fsdp_have_the_same_losses_and_gradients(tmp_path):
    for strategy in ("ddp", "fsdp"):
        (tmp_path / strategy).mkdir()
        torch.multiprocessing.start_processes(
            one_rank, (tmp_path / strategy, in_bfloat16, strategy), 2, start_method="fork"
        )
    ddp, fsdp = (torch.load(tmp_path / strategy / "0.pt") for strategy in ("ddp", "fsdp"))
    assert (ddp - fsdp).norm() < 1e-6 * ddp.norm()
    alone = in_bfloat16(0, 1, "ddp")
    assert (ddp - alone).norm() < 0.01 * alone.norm()


def test_more_tokens_than_learned_positions_are_refused():
    shape = {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    learned = AutoModelForCausalLM.from_config(GPT2Config(n_positions=32, **shape))
    tokenizer = range(64)  # Its length is all that is used of it.
    modeling.check_model(learned, CFG, 1, tokenizer, 32)
    with pytest.raises(ValueError, match="data.max_seq_length=32"):
        modeling.check_model(learned, CFG, 1, tokenizer, 33)
    with pytest.raises(ValueError, match="65 tokens"):
        modeling.check_model(learned, CFG, 1, range(65), 32)
    rotary = tiny_llama()
    rotary.config.max_position_embeddings = 32
    modeling.check_model(rotary, CFG, 1, tokenizer, 33)


@pytest.mark.parametrize(
    "override, world_size, named",
    [
        ("parallel.replicas=2", 1, "parallel.replicas"), ("parallel.cpu_offload=true", 1, "parallel.cpu_offload"),
        ("parallel.context=3", 4, "parallel.context"), ("parallel.context=8", 8, "4 attention heads"),
    ],
)  # fmt: skip
def test_what_the_ranks_cannot_do_is_not_ignored(override, world_size, named):
    cfg = config.load("configs/quickstart.yaml", ["parallel.strategy=fsdp", override])
    with pytest.raises(ValueError, match=named):
        modeling.check_model(tiny_llama(), cfg, world_size, range(64), 10)


def with_unused_parameters(rank, world_size):
    """Gradients of two steps of a model with an image tower, of which text alone is trained."""
    model = architectures.random_model(architectures.small("gemma3"), "per_document")
    parallel, model = modeling.parallelize(model, CFG, "ddp", world_size, CPU)
    rows, sums = ([[0, 1, 2, 3]] if world_size == 1 else [[[0, 1]], [[2, 3]]][rank]), []
    for _ in range(2):
        batches = [packing.collate(architectures.documents(), row) for row in rows]
        train_sft.forward_backward(parallel, batches, world_size)
        sums.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        model.zero_grad(set_to_none=True)
    unused = {name for name, p in model.named_parameters() if "vision_tower" in name or "projector" in name}
    assert len(sums[0]) == sum(p.numel() for name, p in model.named_parameters() if name not in unused)
    return torch.stack(sums)


@pytest.mark.slow
def test_ranks_train_a_model_with_parameters_that_text_does_not_reach(tmp_path):
    arguments = (tmp_path, with_unused_parameters)
    torch.multiprocessing.start_processes(one_rank, arguments, 2, start_method="fork")
    alone = with_unused_parameters(0, 1)
    for rank in range(2):
        assert (torch.load(tmp_path / f"{rank}.pt") - alone).norm() / alone.norm() < 1e-6


def test_experts_are_computed_in_the_dtype_of_the_run(monkeypatch):
    model, dtypes = architectures.random_model(architectures.small("mixtral"), "per_document"), []
    grouped_mm = F.grouped_mm

    def noted(a, b, **others):
        dtypes.append((a.dtype, b.dtype))
        return grouped_mm(a, b, **others)

    monkeypatch.setattr(F, "grouped_mm", noted)
    for dtype in (torch.bfloat16, torch.float32):
        with modeling.cast_params(model, dtype):
            assert model(torch.arange(8)[None]).logits.dtype == dtype
        assert dtypes and {*dtypes} == {(dtype, dtype)}
        dtypes.clear()


@pytest.mark.parametrize(
    ("model_type", "packed"),
    [("gemma2", True), ("gpt_oss", True), ("afmoe", True), ("llama4_text", True), ("gptj", True), ("mpt", False),
     ("mamba", False), ("qwen3_5_text", False)],
)  # fmt: skip
def test_other_architectures_learn_in_packed_rows_what_they_learn_alone(model_type, packed):
    loss, gradient, apart, _ = architectures.differences(architectures.small(model_type))
    assert loss < 1e-5 and gradient < 1e-4 and apart == packed


@pytest.mark.parametrize(
    ("model_type", "changed", "said"),
    [
        ("doge", {}, "attention_mask: set model.attention=eager"),
        ("deepseek_v32", {}, "set model.attention=eager"),
        ("bert", {}, "not causal"),
        ("bert", {"attention": "eager"}, "not causal"),
        ("roberta", {}, "not causal"),
        ("phimoe", {}, "16 tokens.* 20: set data.max_seq_length=16"),
        ("mpt", {"attention": "sdpa"}, "MptForCausalLM"),
    ],
)
def test_a_model_that_packed_rows_would_change_is_refused(model_type, changed, said):
    with pytest.raises(ValueError, match=said):
        architectures.differences(architectures.small(model_type), **changed)


def test_a_model_that_numbers_its_tokens_in_its_own_way_is_refused():
    made = architectures.small("roberta")
    made.is_decoder = True
    for requested, fix in [("auto", "set model.attention=eager"), ("eager", "cannot be trained")]:
        with pytest.raises(ValueError, match=f"packed row; .*{fix}"):
            architectures.differences(made, attention=requested)


def test_quantized_weights_are_refused():
    made = LlamaConfig(quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(ValueError, match="quantized .*mxfp4"):
        modeling.model_class("a-model", made)


def test_looking_at_the_head_leaves_no_trace_where_it_fails(monkeypatch):
    model = tiny_llama()
    monkeypatch.setattr(model.model, "forward", lambda **_: 1 / 0)
    assert not modeling.has_plain_head(model)  # the slower way is right for any head
    assert not model.lm_head._forward_hooks and model.config._attn_implementation == "per_document" and model.training
