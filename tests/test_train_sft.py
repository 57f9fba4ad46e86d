"""The script as a user runs it, from the command line to the files that it leaves."""

import json
import math
import os
import shutil
import signal
import time
import types
from random import Random

import pytest
import torch
from running import ROOT, assert_same_run, metrics, run, run_as_user, start_in_fork, state, wait_for
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import checkpoint
import config
import data
import model as modeling
import templates
import train_sft

FEW = ["train.max_steps=4", "validation.every=2", "validation.exact_match=0", "validation.samples=1",
       "checkpoint.every=2", "train.max_epochs=9", "train.global_batch_size=16",
       "validation.max_examples=32", "data.dataset=configs/quickstart/capitals.py:Capitals"]  # fmt: skip


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("runs") / "single"
    run("configs/quickstart.yaml", f"output_dir={output_dir}", *FEW)
    return output_dir


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, overrides",
    [
        (2, ["parallel.strategy=ddp"]),
        (2, ["parallel.strategy=fsdp"]),
        (2, ["train.max_tokens_per_micro_batch=150"]),
        (2, ["parallel.context=2", "train.max_tokens_per_micro_batch=100", "model.activation_checkpointing=true"]),
        (4, ["parallel.context=2", "parallel.strategy=fsdp"]),
        (1, ["model.activation_checkpointing=true", "train.max_tokens_per_micro_batch=1"]),
        (1, ["model.attention=eager"]),
    ],
)
def test_losses_and_parameters_do_not_depend_on_the_machine(tmp_path, single, processes, overrides):
    out = tmp_path / "out"
    run("configs/quickstart.yaml", f"output_dir={out}", *FEW, *overrides, processes=processes)
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        assert metrics(out, name) == pytest.approx(metrics(single, name), rel=1e-5)
    torch.manual_seed(42)
    start = modeling.load_model(config.load(str(single / "config.yaml"), []).model, torch.device("cpu"))
    a, b, start = (
        torch.cat([value.flatten() for value in model.state_dict().values()])
        for model in (*(AutoModelForCausalLM.from_pretrained(folder / "model") for folder in (out, single)), start)
    )
    assert (a - b).norm() < 1e-4 * (b - start).norm()


@pytest.mark.slow
def test_the_saved_model_has_the_stop_token_and_template_of_training(single):
    for folder in (single / "model", single / "checkpoints/step_00000002/model"):
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
        text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        assert text == "<|im_start|>user\nHi<|im_end|>\n"
        eos = model.generation_config.eos_token_id
        assert tokenizer.convert_tokens_to_ids("<|im_end|>") in (eos if isinstance(eos, list) else [eos])
    assert json.loads((single / "status.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_a_finished_run_is_left_alone_and_another_is_not_overwritten(tmp_path, single):
    said = run("configs/quickstart.yaml", f"output_dir={single}", *FEW)
    assert "finished run" in said
    said = run("configs/quickstart.yaml", f"output_dir={single}", *FEW, "train.learning_rate=1", expect=1)
    assert "train.learning_rate" in said and "Traceback" not in said


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        pytest.param(["configs/none.yaml"], 2, "error: configs/none.yaml: ", marks=pytest.mark.slow),
        (["configs/quickstart.yaml", "train.lr=1"], 2, "no key 'train.lr'"),
        (["configs/quickstart.yaml", "data.dataset=gone.jsonl"], 1, "gone.jsonl"),
        (["configs/quickstart.yaml", "cluster.num_nodes=2"], 2, "cluster.num_nodes"),
        (["configs/quickstart.yaml", "model.name=no/such-model"], 1, "no/such-model"),
        (["configs/quickstart.yaml", "model.name=tests"], 2, "error: tests holds no model"),
    ],
)
def test_a_mistake_is_one_line_and_no_traceback(tmp_path, arguments, code, said):
    start = run_as_user if arguments[0] == "configs/none.yaml" else run
    output = start(*arguments, f"output_dir={tmp_path / 'out'}", expect=code)
    assert said in output and "Traceback" not in output
    assert not (tmp_path / "out").exists()


def test_a_node_that_reads_other_files_than_the_first_is_refused(tmp_path, monkeypatch):
    first = {}

    def check(*overrides, template="a", train="1", validation="2"):
        splits = [types.SimpleNamespace(digest=digest) for digest in (train, validation)]
        train_sft.check_same_data(config.load("configs/quickstart.yaml", [*overrides]), template, *splits)

    monkeypatch.setattr(train_sft.distributed, "broadcast_object", lambda mine: first.setdefault("first", mine))
    check()
    check("data.dataset=elsewhere.jsonl", "data.cache=elsewhere")
    for other in ("template", "train", "validation"):
        with pytest.raises(ValueError, match=f"differs from the first node in: (chat )?{other}"):
            check(**{other: "3"})
    with pytest.raises(ValueError, match="differs from the first node in: seed, train"):
        check("seed=3", "train.eps=1e-3")


def test_the_class_in_the_readme_trains(tmp_path):
    readme = (ROOT / "README.md").read_text()
    code = readme.split("<!-- my_data.py -->\n```python\n")[1].split("```")[0]
    (tmp_path / "my_data.py").write_text(code)
    run("configs/quickstart.yaml", *FEW, f"data.dataset={tmp_path / 'my_data.py'}:Sums",
        "data.args.largest=9", f"output_dir={tmp_path / 'out'}")  # fmt: skip
    assert len(metrics(tmp_path / "out")) == 4


def test_a_run_that_never_validates_needs_no_validation_split(tmp_path):
    (tmp_path / "chats.jsonl").write_text(
        40 * '{"messages": [{"role": "user", "content": "Paris?"}, {"role": "assistant", "content": "France."}]}\n'
    )
    said = run("configs/quickstart.yaml", *FEW, f"data.dataset={tmp_path}/chats.jsonl",
               "data.args={validation: null}", "validation.every=null", f"output_dir={tmp_path}/out")  # fmt: skip
    assert "train: 40 conversations" in said and "validation:" not in said
    assert len(metrics(tmp_path / "out")) == 4 and not metrics(tmp_path / "out", "val/loss")
    assert (tmp_path / "out/model/model.safetensors").is_file()


# ---- nothing is lost -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stopped_at_every_step_a_run_ends_with_the_same_parameters(tmp_path, two_epochs):
    arguments, undisturbed = two_epochs
    out = tmp_path / "out"
    arguments = [*arguments, f"output_dir={out}"]
    for step in range(1, 6):
        if step == 3:
            run(*arguments, "checkpoint.must_save_by=00:00:00:00")
        else:
            run(*arguments, fault="0:1:STOP")
        reason = "checkpoint.must_save_by = 00:00:00:00" if step == 3 else str(out / "STOP")
        assert state(out) == {"state": "stopped", "step": step, "reason": reason}
        assert not (out / "STOP").exists()
    run(*arguments)
    assert state(out)["state"] == "finished"
    assert_same_run(out, undisturbed)


@pytest.mark.slow
def test_killed_at_any_moment_a_run_ends_with_the_same_parameters(tmp_path, two_epochs):
    arguments, undisturbed = two_epochs
    random, kills, out = Random(0), 0, tmp_path / "out0"
    while kills < 15 or (out / "status.json").exists():
        by_time = random.random() < 0.5
        at = None if by_time else (out, random.randrange(1, 150))
        log = out.with_suffix(".log")
        pid = start_in_fork([*arguments, f"output_dir={out}"], tmp_path / "hf", log, kill_at_event=at)
        if by_time:
            time.sleep(random.uniform(0.2, 1.6))
            os.kill(pid, signal.SIGKILL)
        code = wait_for(pid)
        assert code in (0, -signal.SIGKILL), log.read_text()[-2000:]
        kills += code != 0
        for folder in checkpoint.find(out):  # Each is complete.
            state_of_folder = checkpoint.read_parameters(folder)
            assert checkpoint.read_info(folder)["step"] == checkpoint.step_of(folder) and state_of_folder
            assert AutoModelForCausalLM.from_pretrained(folder / "model")
        if (out / "status.json").exists() and state(out)["state"] == "finished":
            assert_same_run(out, undisturbed)
            out = out.with_name(f"out{kills}")


@pytest.mark.slow
def test_a_run_resumes_on_other_ranks_and_strategies_with_equal_losses(tmp_path, two_epochs):
    arguments, undisturbed = two_epochs
    out = tmp_path / "out"
    arguments = [*arguments, f"output_dir={out}"]
    run(*arguments, processes=2, fault="1:2:SIGUSR1")
    run(*arguments, processes=1, fault="0:1:STOP")
    run(*arguments, "parallel.strategy=fsdp", processes=4, fault="3:1:SIGTERM")
    run(*arguments, "parallel.strategy=fsdp", "parallel.replicas=2", processes=4, fault="0:1:STOP")
    run(*arguments, "train.max_tokens_per_micro_batch=100", processes=2)
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        assert metrics(out, name) == pytest.approx(metrics(undisturbed, name), rel=1e-5)


@pytest.mark.slow
def test_three_ranks_that_are_stopped_end_with_the_same_parameters(tmp_path, two_epochs):
    arguments, _ = two_epochs
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    run(*arguments, f"output_dir={undisturbed}", processes=3)
    run(*arguments, f"output_dir={out}", processes=3, fault="2:3:SIGTERM")
    run(*arguments, f"output_dir={out}", processes=3)
    assert_same_run(out, undisturbed)


@pytest.mark.slow
def test_a_stop_file_of_this_launch_is_obeyed_and_a_stale_one_is_not(tmp_path, two_epochs):
    arguments, undisturbed = two_epochs
    out = tmp_path / "out"
    arguments = [*arguments, f"output_dir={out}"]
    out.mkdir()
    (out / "STOP").touch()
    os.utime(out / "STOP", (time.time() + 60, time.time() + 60))
    run(*arguments)
    assert state(out)["state"] == "stopped" and state(out)["step"] == 1
    (out / "STOP").touch()
    os.utime(out / "STOP", (time.time() - 60, time.time() - 60))
    run(*arguments)
    assert_same_run(out, undisturbed)


@pytest.mark.slow
def test_an_end_before_the_newest_checkpoint_is_refused(tmp_path, two_epochs):
    arguments, _ = two_epochs
    out = tmp_path / "out"
    arguments = [*arguments, f"output_dir={out}"]
    run(*arguments, fault="0:3:STOP")
    assert "step_00000003 is past the end" in run(*arguments, "train.max_steps=2", expect=1)
    assert not (out / "model").exists()
    assert state(out)["state"] == "stopped" and "max_steps: 2\n" not in (out / "config.yaml").read_text()


@pytest.mark.slow
def test_resuming_on_other_conversations_is_refused(tmp_path, two_epochs):
    arguments, out, chats = two_epochs[0], tmp_path / "out", tmp_path / "chats.jsonl"
    path = arguments[1].removeprefix("data.dataset=")
    shutil.copy(path, chats)
    arguments = [*arguments, f"data.dataset={chats}", f"output_dir={out}"]
    run(*arguments, fault="0:2:STOP")
    chats.write_text(chats.read_text().replace("Say", "Sing"))
    said = run(*arguments, expect=1).splitlines()[-1]
    assert said.startswith("error: ") and "was trained on other data" in said
    assert [checkpoint.step_of(folder) for folder in checkpoint.find(out)] == [1, 2]
    chats.write_text(chats.read_text().replace("Sing", "Say"))
    run(*arguments)
    assert_same_run(out, two_epochs[1])


@pytest.mark.slow
def test_a_mixture_has_a_validation_loss_per_dataset_and_in_total(tmp_path):
    def chats(name, answer):
        chat = [{"role": "user", "content": "Say {i}"}, {"role": "assistant", "content": answer}]
        with open(tmp_path / name, "w") as file:
            file.writelines(json.dumps({"messages": chat}).replace("{i}", str(i)) + "\n" for i in range(30))
        return f"{{dataset: {tmp_path}/{name}, args: {{validation: 0.2}}, weight: %s}}"

    a, b = chats("short.jsonl", "la"), chats("long.jsonl", "la la la la")
    few = [*FEW, "validation.max_examples=5", "train.max_steps=2"]
    datasets = {"a": a % 1, "b": b % 1, "both": f"{a % 2}, {b % 0.5}"}
    for name, entries in datasets.items():
        arguments = ["configs/quickstart.yaml", f"output_dir={tmp_path}/{name}", *few, f"data.dataset=[{entries}]"]
        run(*arguments, processes=2 if name == "both" else 1)
    losses = {name: metrics(tmp_path / name, "val/loss")[0] for name in datasets}
    tokens = {name: metrics(tmp_path / name, "val/supervised_tokens")[0] for name in datasets}
    assert metrics(tmp_path / "both", "val/loss/short")[0] == pytest.approx(losses["a"], rel=1e-6)
    assert metrics(tmp_path / "both", "val/loss/long")[0] == pytest.approx(losses["b"], rel=1e-6)
    assert tokens["both"] == tokens["a"] + tokens["b"]
    mean = (losses["a"] * tokens["a"] + losses["b"] * tokens["b"]) / tokens["both"]
    assert losses["both"] == pytest.approx(mean, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["chats", "tools"])
def test_the_recipes_that_need_nothing_run_as_they_stand(tmp_path, recipe):
    few = ["train.max_steps=3", "validation.exact_match=4", "validation.max_examples=8", "validation.samples=1"]
    run(f"configs/{recipe}.yaml", f"output_dir={tmp_path}/out", *few, processes=2)
    losses = metrics(tmp_path / "out")
    assert losses[3] < losses[1] and len(metrics(tmp_path / "out", "val/exact_match")) == 2


def test_a_trained_tool_call_is_the_whole_call_and_its_end(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained("configs/quickstart")
    template = (ROOT / "configs/tools/chat_template.jinja").read_text()
    rows = data.load_dataset_class("configs/tools/cities.py:Cities", {}).formatted_ds["train"]
    encoded = templates.encode(tokenizer, rows[0]["messages"], rows[0]["tools"], template)
    trained = tokenizer.decode([label for label in encoded.labels if label != -100])
    call, answer = rows[0]["messages"][1]["tool_calls"][0]["function"], rows[0]["messages"][3]["content"]
    assert trained == f"<tool_call>\n{json.dumps(call)}\n</tool_call><|im_end|>{answer}<|im_end|>"


@pytest.mark.slow
def test_a_run_that_failed_before_its_first_step_leaves_the_folder_free(tmp_path):
    out = tmp_path / "out"
    arguments = ["configs/quickstart.yaml", f"output_dir={out}", *FEW, "tokenizer.name=configs/quickstart"]
    assert "no/where" in run(*arguments, "model.name=no/where", expect=1)
    assert state(out)["state"] == "failed"
    run(*arguments, "train.max_steps=2")
    assert [*metrics(out)] == [1, 2]
    assert "train.learning_rate" in run(*arguments, "train.learning_rate=1", expect=1)


@pytest.mark.slow
def test_a_finished_run_whose_model_is_gone_writes_it_again(tmp_path, single):
    shutil.copytree(single, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/model")
    run("configs/quickstart.yaml", f"output_dir={tmp_path}/out", *FEW)
    assert_same_run(tmp_path / "out", single)


@pytest.mark.slow
def test_a_date_that_the_template_prints_is_the_first_launchs(tmp_path, two_epochs, monkeypatch):
    arguments, out = [*two_epochs[0], f"output_dir={tmp_path}/out"], tmp_path / "out"
    (tmp_path / "dated.jinja").write_text(
        "<|im_start|>system\n{{ strftime_now('%d %b %Y') }}<|im_end|>\n{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    arguments.append(f"tokenizer.chat_template={tmp_path}/dated.jinja")
    with monkeypatch.context() as environment:
        environment.setenv("SFT_STARTED", "1577880000")
        run(*arguments, "checkpoint.must_save_by=00:00:00:00")
    run(*arguments)
    assert state(out)["state"] == "finished"
    assert config.load(str(out / "config.yaml"), []).tokenizer.date == "2020-01-01"
    run(*arguments, f"output_dir={tmp_path}/again", "tokenizer.date=2020-01-01")
    assert_same_run(out, tmp_path / "again")
    run(*arguments, f"output_dir={tmp_path}/today")
    assert metrics(out)[6] != metrics(tmp_path / "today")[6]


@pytest.mark.slow
def test_a_run_that_diverged_resumes_with_another_learning_rate(tmp_path, two_epochs):
    arguments, out = [*two_epochs[0], f"output_dir={tmp_path}/out"], tmp_path / "out"
    for validates, rate, reason in (1, "1e40", "step 1: val/loss is "), ("null", "1e38", ", gradient norm "):
        said = run(*arguments, f"train.learning_rate={rate}", f"validation.every={validates}", "checkpoint.every=null",
                   expect=1)  # fmt: skip
        assert reason in said and "lower train.learning_rate" in said and "Traceback" not in said
        for line in (out / "metrics.jsonl").read_text().splitlines():
            assert math.isfinite(sum(json.loads(line).values()))
        assert state(out)["state"] == "failed" and not checkpoint.find(out)
    assert "train.eps" in run(*arguments, "train.learning_rate=1e-3", "train.eps=1e-3", expect=1)
    run(*arguments, "train.learning_rate=1e-3")
    assert len(metrics(out)) == 6
    assert "train.learning_rate" in run(*arguments, "train.learning_rate=1e-4", expect=1)


@pytest.mark.slow
def test_out_of_memory_is_one_line_with_what_helps(tmp_path, two_epochs):
    arguments = [*two_epochs[0], f"output_dir={tmp_path}/out"]
    said = run(*arguments, fault="0:2:memory", expect=1).splitlines()[-1]
    helps = (
        "max_tokens_per_micro_batch = 8192",
        "max_tokens_per_micro_batch=4096",
        "activation_checkpointing",
        "fsdp",
        "lora",
    )
    places = [said.index(name) for name in helps]
    assert said.startswith("error: ") and places == sorted(places)
    said = run(*arguments, "train.max_tokens_per_micro_batch=8", fault="0:2:memory", expect=1).splitlines()[-1]
    assert "max_tokens_per_micro_batch=" not in said  # A row holds a single conversation.


@pytest.mark.slow
def test_a_model_of_few_positions_answers_within_them(tmp_path):
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 96, "vocab_size": 1024}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=2, eos_token_id=2)).save_pretrained(tmp_path / "gpt2")
    run("configs/quickstart.yaml", f"output_dir={tmp_path}/out", *FEW, "model.from_scratch=false",
        f"model.name={tmp_path}/gpt2", "tokenizer.name=configs/quickstart", "data.max_seq_length=96",
        "validation.exact_match=100", "validation.max_examples=8", "train.max_steps=1")  # fmt: skip
    assert len(metrics(tmp_path / "out", "val/exact_match")) == 2


@pytest.mark.slow
def test_the_best_checkpoint_is_the_best_that_there_is_though_the_loss_was_lower_before(tmp_path):
    out = tmp_path / "out"
    run("configs/quickstart.yaml", *FEW, f"output_dir={out}", "train.max_steps=5", "train.learning_rate=0.5",
        "train.warmup_steps=0", "validation.every=1", "checkpoint.final=best", "checkpoint.every=null")  # fmt: skip
    losses = metrics(out, "val/loss")
    best = min((loss, step) for step, loss in losses.items() if step)[1]
    assert losses[0] < losses[best] and best < 5, losses
    assert checkpoint.step_of(checkpoint.best(out)) == best
    assert f"| step | {best} |" in (out / "model/README.md").read_text()


@pytest.mark.slow
def test_patience_ends_the_run_and_final_best_exports_the_best_checkpoint(tmp_path):
    out = tmp_path / "out"
    overrides = [
        "configs/quickstart.yaml", *FEW, f"output_dir={out}", "train.max_steps=60", "train.learning_rate=0.3",
        "validation.every=1", "validation.patience=3", "checkpoint.final=best", "checkpoint.every=null",
        "checkpoint.keep=9", "train.profile=[2, 3]",
    ]  # fmt: skip
    said = run(*overrides)
    losses = metrics(out, "val/loss")
    best, last = min(losses, key=losses.get), max(losses)
    assert last == best + 3 < 60 and state(out)["state"] == "finished" and "finished run" in run(*overrides)
    assert f"step_{best:08d}, val/loss {losses[best]:.4f}" in said
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (out / "model", checkpoint.best(out) / "model")]
    a, b = (torch.cat([value.flatten() for value in model.state_dict().values()]) for model in models)
    assert torch.equal(a, b) and checkpoint.step_of(checkpoint.best(out)) == best
    assert json.loads((out / "profile.json").read_text())["traceEvents"]
    (out / "status.json").write_text(json.dumps({"state": "running", "step": last, "reason": None}))
    shutil.rmtree(out / "model")  # as if it was killed before the export
    run(*overrides)
    assert state(out)["state"] == "finished" and max(metrics(out, "val/loss")) == last and (out / "model").is_dir()
    run(*overrides, "validation.patience=4")
    assert max(metrics(out, "val/loss")) > last
