"""The report before the run, from the command line as a user gives it."""

import json
import re
from pathlib import Path

import pytest
import torch
from running import call, script
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

import config as configuration
import model as modelling
import preview

ROOT = Path(__file__).parent.parent
QUICKSTART = ["configs/quickstart.yaml", "data.dataset=configs/quickstart/capitals.py:Capitals"]


def run(tmp_path, *arguments, expect=0):
    return call(preview.main, *arguments, f"output_dir={tmp_path / 'out'}", expect=expect, home=tmp_path / "hf")[0]


def test_the_report_shows_what_is_trained_and_starts_nothing(tmp_path):
    page = tmp_path / "page.html"
    arguments = [*QUICKSTART, f"output_dir={tmp_path / 'out'}", "--samples", "2", "--ids", "--html", str(page)]
    text, _ = script("preview.py", *arguments, HF_HOME=str(tmp_path / "hf"))
    trained = re.findall(r"⟦(.*?)⟧", text, re.S)
    assert trained[1:] and all(part.endswith("<|im_end|>") for part in trained if part != " ")
    assert not any("user" in part or "<|im_start|>" in part for part in trained)
    assert "no problems" in text and "\033[" not in text
    marked = re.findall(r'<span class="trained(?: special)?">(.*?)</span>', page.read_text(), re.S)
    assert "".join(marked[1:]).count("&lt;|im_end|&gt;") == len([part for part in trained if part != " "])
    listed = re.findall(r"^ +\d+ +\d+ +(trained|-) ", text, re.M)
    assert listed.count("trained") == sum(map(int, re.findall(r"(\d+) trained; the trained text is", text)))
    assert not (tmp_path / "out").exists()


def test_the_figures_as_json_are_those_of_the_data(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"Is {i} odd?"}, {"role": "assistant", "content": "Yes."}]}
        for i in (1, 3, 5, 7, 7)
    ]
    rows += [{"messages": [*rows[0]["messages"], *rows[1]["messages"]]}]
    rows += [{"messages": [{"role": "user", "content": "word " * 400}, {"role": "assistant", "content": "No."}]}]
    rows[1]["tools"] = [{"type": "function", "function": {"name": "is_odd"}}]  # the template has no place for them
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "validation.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps(
        {"messages": [rows[1]["messages"][0], {"role": "assistant", "content": "Of course."}]}
    ))  # fmt: skip
    report = json.loads(
        run(
            tmp_path, "configs/quickstart.yaml", f"data.dataset={tmp_path / 'train.jsonl'}", "--json",
            f"data.args.validation={tmp_path / 'validation.jsonl'}", "train.global_batch_size=4",
            "train.max_epochs=3", "train.max_steps=null", "--world-size", "2", "data.max_seq_length=128",
        )
    )  # fmt: skip
    train = report["train"]
    assert (train["conversations"], train["trained_turns"], train["overlong"], train["duplicates"]) == (6, 7, 1, 1)
    assert sum(count for _, count in train["length_histogram"]) == 6
    assert report["overlap"] == {"conversations": 1, "prompts": 2}
    assert (report["batches"]["steps_per_epoch"], report["batches"]["steps"]) == (2, 6)
    assert report["stop_tokens"][0] == "<|im_end|>" and report["problems"] == []
    assert any("overlong" in note for note in report["notes"])
    trained = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ROOT / "configs/quickstart"))
    assert report["memory"]["model_weights"] == sum(p.numel() for p in trained.parameters())  # tied ones once
    assert report["left_out"] == {
        "train train": {"content (user)": [0, 8], "content (assistant)": [0, 8], "tools": [1, 1]}
    }
    assert any("leaves out, wholly or in part, tools 1 times of 1:" in note for note in report["notes"])


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["train.lr=1"], ["no key 'train.lr'"]),
        (["parallel.strategy=fsdp", "parallel.replicas=3", "--world-size", "8"], ["parallel.replicas = 3 does not"]),
        (["parallel.context=3", "--world-size", "8"], ["parallel.context = 3 does not divide the 8 process"]),
        (["parallel.context=8", "--world-size", "8"], ["parallel.context = 8 does not divide the model's 4 attention"]),
        (["--gpu-memory", "0.01"], ["a GPU would need"]),
        (["data.max_seq_length=8"], ["'train'", "nothing to train"]),
        (["parallel.strategy=fsdp", "parallel.cpu_offload=true"], ["cpu_offload needs more than one process"]),
        (["model.attention=varlen"], ["model.attention=varlen"]),
        (["model.from_scratch=false"], ["'configs/quickstart' holds no weights"]),
        (["tokenizer.chat_template=my.jinja2"], ["is neither Jinja text nor the path of a .jinja file"]),
    ],
)
def test_what_would_stop_the_run_is_a_problem_and_exit_code_1(tmp_path, arguments, said):
    report = json.loads(run(tmp_path, *QUICKSTART, *arguments, "--json", expect=1))
    assert all(any(part in text for text in report["problems"]) for part in said)


def test_every_bad_row_is_a_problem(tmp_path):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    bad = {"messages": [{"role": "pilot", "content": "a"}]}
    (tmp_path / "chats.jsonl").write_text("\n".join([json.dumps(good)] * 30 + [json.dumps(bad), "{", json.dumps(bad)]))
    report = json.loads(
        run(tmp_path, "configs/quickstart.yaml", f"data.dataset={tmp_path / 'chats.jsonl'}", "--json", expect=1)
    )
    text = "\n".join(report["problems"])
    assert "chats.jsonl:31: messages[0]: the role 'pilot'" in text and "chats.jsonl:32: is not valid JSON" in text
    assert len(report["problems"]) == 2 and "(and in 1 more)" in report["problems"][0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_memory_of_fake_tensors_is_that_of_real_ones(checkpointing):
    config = AutoConfig.from_pretrained(ROOT / "configs/quickstart")
    measured = []
    for mode in (FakeTensorMode(), torch.random.fork_rng()):
        with mode:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="per_document")
            settings = configuration.load(None, [f"model.activation_checkpointing={str(checkpointing).lower()}"])
            modelling.prepare_for_training(model, settings.model)
            with modelling.computing_in(torch.bfloat16, model):
                measured.append(preview.saved_bytes(model, 300, 40, 300))
    assert measured[0] == measured[1] > 300 * config.hidden_size * config.num_hidden_layers
