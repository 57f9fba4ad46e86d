"""The report before the run, from the command line as a user gives it."""

import json
import os
import re
import time

import pytest
import torch
from running import HOME, call
from running import run as launch
from transformers import AutoTokenizer

import config
import preview
from checkpoint import state_of
from model import cast_params, load_model
from train_sft import make_optimizer

QUICKSTART = ["configs/quickstart.yaml", "data.dataset=configs/quickstart/capitals.py:Capitals"]


def run(tmp_path, *arguments, expect=0):
    return call(preview.main, *arguments, f"output_dir={tmp_path / 'out'}", expect=expect, home=HOME)[0]


@pytest.mark.slow
def test_the_report_shows_what_is_trained_and_starts_nothing(tmp_path):
    page = tmp_path / "page.html"
    arguments = [*QUICKSTART, f"output_dir={tmp_path / 'out'}", "--samples", "2", "--ids", "--html", str(page)]
    text = launch(*arguments, name="preview.py")
    trained = re.findall(r"⟦(.*?)⟧", text, re.S)
    assert trained[1:] and all(part.endswith("<|im_end|>") for part in trained if part != " ")
    assert not any("user" in part or "<|im_start|>" in part for part in trained)
    assert "no problems" in text and "\033[" not in text
    marked = re.findall(r'<span class="trained(?: special)?">(.*?)</span>', page.read_text(), re.S)
    assert "".join(marked).count("&lt;|im_end|&gt;") == len([part for part in trained if part != " "])
    listed = re.findall(r"^ +\d+ +\d+ +(trained|-) ", text, re.M)
    assert listed.count("trained") == sum(map(int, re.findall(r"(\d+) trained; the trained text is", text)))
    assert not (tmp_path / "out").exists()


def test_a_note_says_that_blocks_are_not_compiled_where_there_is_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "gcc")
    assert "not compiled" not in run(tmp_path, "configs/chats.yaml", "model.dtype=bfloat16")
    monkeypatch.delenv("CC")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "no C compiler" in run(tmp_path, "configs/chats.yaml", "model.dtype=bfloat16")


def test_a_page_that_cannot_be_written_is_a_problem(tmp_path):
    text = run(tmp_path, "configs/chats.yaml", "--html", tmp_path / "nowhere/page.html", expect=1)
    assert "page.html" in text and "no problems" not in text


def test_the_metrics_as_json_are_those_of_the_data(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"Is {i} odd?"}, {"role": "assistant", "content": "Yes."}]}
        for i in (1, 3, 5, 7, 7)
    ]
    rows += [{"messages": [*rows[0]["messages"], *rows[1]["messages"]]}]
    rows += [{"messages": [{"role": "user", "content": "word " * 400}, {"role": "assistant", "content": "No."}]}]
    rows[1]["tools"] = [{"type": "function", "function": {"name": "is_odd"}}]  # The template has no place for them.
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
    assert train["turns_without_end_token"] == 0
    tokenizer = AutoTokenizer.from_pretrained("configs/quickstart")
    answer = tokenizer.encode("Yes.<|im_end|>", add_special_tokens=False)
    assert train["supervised_tokens"] == 7 * len(answer)
    assert report["overlap"] == {"conversations": 1, "prompts": 2}
    assert (report["batches"]["steps_per_epoch"], report["batches"]["steps"]) == (2, 6)
    assert report["stop_tokens"][0] == "<|im_end|>" and report["problems"] == []
    model = load_model(config.load("configs/quickstart.yaml", []).model, torch.device("cpu"))
    assert report["memory"]["model_weights"] == sum(p.numel() for p in model.parameters())  # tied ones once


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["train.lr=1"], "train.lr"),
        (["parallel.strategy=fsdp", "parallel.replicas=3", "--world-size", "8"], "parallel.replicas"),
        (["parallel.context=3", "--world-size", "8"], "parallel.context"),
        (["parallel.context=8", "--world-size", "8"], "parallel.context"),  # The model has four attention heads.
        (["--gpu-memory", "0.01"], "GiB"),
        (["data.max_seq_length=8"], "max_seq_length"),
        (["parallel.strategy=fsdp", "parallel.cpu_offload=true"], "cpu_offload"),
        (["model.attention=varlen"], "model.attention"),
        (["tokenizer.chat_template=my.jinja2"], "my.jinja2"),
        (["output_dir=configs"], "output_dir"),
    ],
)
def test_what_would_stop_the_run_is_a_problem_and_exit_code_1(tmp_path, arguments, named):
    arguments = ["configs/chats.yaml", f"output_dir={tmp_path / 'out'}", *arguments, "--json"]
    report = json.loads(call(preview.main, *arguments, expect=1, home=HOME)[0])
    assert any(named in text for text in report["problems"])


def test_each_reason_for_bad_rows_is_a_problem_with_its_first_row(tmp_path):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    bad = {"messages": [{"role": "pilot", "content": "a"}]}
    unanswered = {"messages": [{"role": "user", "content": "a"}]}
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, [*[good] * 30, bad, unanswered, bad])))
    arguments = [f"data.dataset={tmp_path / 'chats.jsonl'}", "data.args.validation=null", "validation.every=null"]
    arguments += ["validation.exact_match=0", "--json"]
    report = json.loads(run(tmp_path, "configs/quickstart.yaml", *arguments, expect=1))
    pilot, no_answer = report["problems"]
    assert "chats.jsonl" in pilot and "31" in pilot and "'pilot'" in pilot and "1 more" in pilot
    assert "chats.jsonl" in no_answer and "32" in no_answer and "assistant" in no_answer


def test_tokens_not_used_for_a_month_are_named_with_their_size(tmp_path):
    chats = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chats}))
    arguments = [f"data.dataset={tmp_path / 'chats.jsonl'}", "data.args.validation=null", "validation.every=null"]
    arguments += ["validation.exact_match=0", f"data.cache={tmp_path / 'cache'}", "--json"]

    def notes():
        found = json.loads(run(tmp_path, "configs/quickstart.yaml", *arguments))["notes"]
        return [note for note in found if str(tmp_path / "cache") in note]

    assert notes() == [] and len([*(tmp_path / "cache").glob("*.arrow")]) == 1
    month_ago = time.time() - 31 * 24 * 3600
    for path in [*(tmp_path / "cache").glob("*.arrow"), tmp_path / "cache/other.arrow"]:
        path.touch()
        os.utime(path, (month_ago, month_ago))
    (tmp_path / "cache/other.arrow").write_bytes(b"x" * 2**24)
    os.utime(tmp_path / "cache/other.arrow", (month_ago, month_ago))
    (note,) = notes()  # The tokens of this configuration have just been used.
    assert "1 files" in note and "0.02 GiB" in note


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_the_predicted_memory_is_that_of_real_tensors(monkeypatch, checkpointing):
    overrides = ["model.dtype=bfloat16", "model.compile=false", f"model.activation_checkpointing={checkpointing}"]
    cfg = config.load("configs/quickstart.yaml", overrides)
    monkeypatch.setattr(preview, "GIB", 1)  # so that the report counts bytes
    tokenizer = AutoTokenizer.from_pretrained("configs/quickstart")
    row = {"largest_row_tokens": 300, "largest_row_supervised": 40}
    predicted = preview.memory(cfg, tokenizer, 80, 300, {"world_size": 1, "batches": row})

    model = load_model(cfg.model, torch.device("cpu"))
    params = [*model.parameters()]
    assert predicted["weights_gib"] == predicted["gradients_gib"] == sum(p.nbytes for p in params)
    state = state_of(model, make_optimizer(model, cfg.train))
    assert predicted["optimizer_gib"] == sum(t.nbytes for name, t in state.items() if name.startswith("optimizer."))
    assert predicted["copies_gib"] == sum(2 * p.numel() for p in params)
    with cast_params(model, torch.bfloat16):
        saved = preview.saved_bytes(model, 300, 40, 300)
        if checkpointing == "true":
            model.gradient_checkpointing_disable()
            saved += preview.saved_bytes(model, 300, 40, 300) // model.config.num_hidden_layers
    assert predicted["activations_gib"] == saved > 300 * model.config.hidden_size * model.config.num_hidden_layers
