"""What needs a GPU, each in a process that sees it: the other tests do not (conftest.py)."""

import os

import pytest
import torch
from running import GPUS, metrics, run_as_user
from test_attention import ENDS, ROW, attended, inputs

import attention
import packing

pytestmark = pytest.mark.skipif(not GPUS, reason="needs a GPU")
FEW = ["configs/quickstart.yaml", "train.max_steps=8", "train.warmup_steps=0", "validation.every=4",
       "validation.exact_match=8", "checkpoint.every=4"]  # fmt: skip


def train(folder, *arguments, gpus=1):
    said = run_as_user(
        *FEW, *arguments, f"output_dir={folder}", processes=gpus, CUDA_VISIBLE_DEVICES=",".join(GPUS[:gpus])
    )
    assert f"over {gpus} rank(s) on cuda" in said
    return losses(folder)


def losses(folder):
    return metrics(folder) | {f"validated after {k}": v for k, v in metrics(folder, "val/loss").items()}


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """The folder of a run on the CPU in float32."""
    folder = tmp_path_factory.mktemp("cpu") / "out"
    run_as_user(*FEW, f"output_dir={folder}")
    return folder


@pytest.fixture(scope="module")
def wanted(on_cpu):
    return losses(on_cpu)


@pytest.mark.parametrize(
    "overrides, rel",
    [
        (["model.dtype=float32"], 1e-3),
        (["model.dtype=bfloat16"], 0.01),
        (["model.dtype=bfloat16", "model.attention=sdpa"], 0.01),
        (["model.dtype=bfloat16", "model.compile=false"], 0.01),
        (["model.dtype=bfloat16", "model.activation_checkpointing=true", "checkpoint.async_save=false"], 0.01),
    ],
)
def test_a_run_on_a_gpu_has_the_losses_of_the_cpu(tmp_path, wanted, overrides, rel):
    assert train(tmp_path / "out", *overrides) == pytest.approx(wanted, rel=rel)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_on_a_gpu_is_the_same(tmp_path, dtype):
    options = [f"model.dtype={dtype}", "train.schedule=constant", "train.optimizer=adamw"]
    whole = train(tmp_path / "whole", *options)
    train(tmp_path / "out", *options, "train.max_steps=4")
    resumed = train(tmp_path / "out", *options)
    if dtype == "float32":
        assert resumed == whole
    else:  # The flash attention's backward pass adds in any order.
        assert resumed == pytest.approx(whole, rel=1e-3)


def test_four_and_eight_bits_on_a_gpu_have_nearly_the_losses_of_the_plain_base(tmp_path, on_cpu):
    pytest.importorskip("bitsandbytes")
    model = f"{on_cpu}/model"
    options = ["model.from_scratch=false", f"model.name={model}", f"tokenizer.name={model}", "model.dtype=bfloat16"]
    plain = train(tmp_path / "plain", *options, "model.lora.rank=64")
    bits = ["model.lora.rank=64", "model.lora.base=nf4", "train.optimizer=adamw_8bit"]
    assert train(tmp_path / "bits", *options, *bits) == pytest.approx(plain, rel=0.05)
    full = train(tmp_path / "full", *options)
    assert train(tmp_path / "full_bits", *options, "train.optimizer=adamw_8bit") == pytest.approx(full, rel=0.05)


@pytest.mark.skipif(len(GPUS) < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "overrides",
    [["parallel.strategy=ddp"], ["parallel.strategy=fsdp"], ["parallel.strategy=fsdp", "parallel.cpu_offload=true"],
     ["parallel.context=2"]],
)  # fmt: skip
def test_two_gpus_have_the_losses_of_the_cpu(tmp_path, wanted, overrides):
    assert train(tmp_path / "out", "model.dtype=bfloat16", *overrides, gpus=2) == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("window", [None, 4])
def test_both_kernels_give_the_same_output_and_gradients(monkeypatch, window):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(GPUS))
    torch.multiprocessing.spawn(compare_kernels, (window,))


def compare_kernels(_, window):
    assert os.environ["CUDA_VISIBLE_DEVICES"]
    results, row = [], packing.Documents(ENDS, ROW.starts.cuda())
    for kernel in (attention.per_document, attention.per_document_varlen):
        made = [x.to("cuda", torch.bfloat16).requires_grad_() for x in inputs(2)]
        output, _ = kernel(torch.nn.Module(), *made, None, sliding_window=window, documents=row)
        output.float().square().sum().backward()
        results.append([output.detach(), *(x.grad for x in made)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
    wanted = attended(*inputs(2), ENDS, window)
    torch.testing.assert_close(results[1][0].float().cpu(), wanted, rtol=0.05, atol=0.05)
