"""The script as a user runs it, in a subprocess."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent
FEW = ["train.max_steps=4", "validation.every=2", "validation.exact_match=0", "validation.samples=1",
       "checkpoint.every=2", "train.max_epochs=9", "data.dataset=configs/quickstart/capitals.py:Capitals"]  # fmt: skip


def run(tmp_path, *arguments, processes=1, expect=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = (command if processes > 1 else [sys.executable]) + ["train_sft.py", *arguments]
    environment = {**os.environ, "HF_HOME": str(tmp_path.parent / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def metrics(output_dir, name="train/loss"):
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("runs") / "single"
    run(output_dir, "configs/quickstart.yaml", f"output_dir={output_dir}", *FEW)
    return output_dir


@pytest.mark.parametrize(
    "processes, overrides",
    [
        (2, ["parallel.strategy=ddp"]),
        (2, ["parallel.strategy=fsdp"]),
        (2, ["train.max_tokens_per_micro_batch=150"]),
        (1, ["model.activation_checkpointing=true", "train.max_tokens_per_micro_batch=1"]),
        (1, ["model.attention=eager"]),
    ],
)
def test_the_losses_and_weights_do_not_depend_on_the_machine(tmp_path, single, processes, overrides):
    out = tmp_path / "out"
    run(out, "configs/quickstart.yaml", f"output_dir={out}", *FEW, *overrides, processes=processes)
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        assert metrics(out, name) == pytest.approx(metrics(single, name), rel=1e-5)
    a, b = (AutoModelForCausalLM.from_pretrained(folder / "model").state_dict() for folder in (out, single))
    assert all(torch.allclose(a[name], b[name], atol=2e-3) for name in b)


def test_the_saved_model_stops_where_the_trained_turn_ends_and_brings_its_template(single):
    for folder in (single / "model", single / "checkpoints/step_00000002/model"):
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
        text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        assert text == "<|im_start|>user\nHi<|im_end|>\n"
        eos = model.generation_config.eos_token_id
        assert tokenizer.convert_tokens_to_ids("<|im_end|>") in (eos if isinstance(eos, list) else [eos])
    assert json.loads((single / "status.json").read_text())["state"] == "finished"


def test_a_finished_run_is_left_as_it_is_and_another_is_not_overwritten(tmp_path, single):
    said = run(tmp_path, "configs/quickstart.yaml", f"output_dir={single}", *FEW)
    assert "finished run" in said
    said = run(tmp_path, "configs/quickstart.yaml", f"output_dir={single}", *FEW, "train.learning_rate=1", expect=1)
    assert "train.learning_rate" in said and "Traceback" not in said


def test_a_stopped_run_goes_on_to_the_same_weights_and_shows_each_step_once(tmp_path, single):
    out = tmp_path / "out"
    out_args = ["configs/quickstart.yaml", f"output_dir={out}", *FEW]
    run(out, *out_args, "checkpoint.must_save_by=00:00:00:00")
    assert json.loads((out / "status.json").read_text())["state"] == "stopped"
    run(out, *out_args)
    assert metrics(out) == metrics(single)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == [1, 2, 3, 4]
    a, b = (AutoModelForCausalLM.from_pretrained(folder / "model").state_dict() for folder in (out, single))
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["configs/none.yaml"], 2, "cannot be read"),
        (["configs/quickstart.yaml", "train.lr=1"], 2, "no key 'train.lr'"),
        (["configs/quickstart.yaml", "data.dataset=gone.jsonl"], 1, "gone.jsonl"),
        (["configs/quickstart.yaml", "cluster.num_nodes=2"], 2, "cluster.num_nodes"),
        (["configs/quickstart.yaml", "model.name=no/such-model"], 1, "no/such-model"),
    ],
)
def test_a_mistake_is_one_line_and_no_traceback(tmp_path, arguments, code, said):
    output = run(tmp_path, *arguments, f"output_dir={tmp_path / 'out'}", expect=code)
    assert said in output and "Traceback" not in output
    assert not (tmp_path / "out").exists()


def test_the_class_in_the_readme_trains(tmp_path):
    readme = (ROOT / "README.md").read_text()
    code = readme.split("<!-- my_data.py -->\n```python\n")[1].split("```")[0]
    (tmp_path / "my_data.py").write_text(code)
    run(tmp_path, "configs/quickstart.yaml", *FEW, f"data.dataset={tmp_path / 'my_data.py'}:Sums",
        "data.args.largest=9", f"output_dir={tmp_path / 'out'}")  # fmt: skip
    assert len(metrics(tmp_path / "out")) == 4
