"""Checkpoints: complete at any moment, bitwise when read, on any number of ranks; what is never overwritten."""

import json
import os
import resource
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from huggingface_hub import ModelCard, ModelInfo, RepoUrl
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import checkpoint
import config
from export import meta_model, verify_export
from train_sft import make_optimizer

CFG = config.load(None, [])


def tiny(seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
    )
    return model, make_optimizer(model, CFG.train)


def a_step(model, optimizer):
    model(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def writer(output_dir, model, keep=9, async_save=False):
    empty = meta_model(model.config, model.generation_config, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained("configs/quickstart")
    cfg = config.Checkpoint(keep=keep, async_save=async_save)
    return checkpoint.CheckpointWriter(output_dir, cfg, empty, tokenizer, [3])


def trained_and_saved(output_dir, steps=(1,), **options):
    """A model after one step, saved as the checkpoint of each of these steps."""
    model, optimizer = tiny()
    a_step(model, optimizer)
    a_writer = writer(output_dir, model, **options)
    for step in steps:
        a_writer.save(step, model, optimizer, {})
        wait(a_writer)
    return model, optimizer, a_writer


def copies(model, optimizer):
    state = checkpoint.state_of(model, optimizer)
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in state.items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def wait(a_writer):
    while not a_writer.done(0.1):
        pass


@pytest.mark.parametrize("async_save", [False, True])
def test_a_checkpoint_holds_its_step_whatever_the_loop_does_meanwhile(tmp_path, async_save):
    model, optimizer = tiny()
    a_step(model, optimizer)
    wanted, a_writer = copies(model, optimizer), writer(tmp_path, model, async_save=async_save)
    a_writer.save(1, model, optimizer, {})
    a_step(model, optimizer)
    assert not equal(copies(model, optimizer), wanted)
    wait(a_writer)
    other, other_optimizer = tiny()
    checkpoint.load(tmp_path / "checkpoints/step_00000001", other, other_optimizer)
    assert equal(copies(other, other_optimizer), wanted)
    params = {name.removeprefix("model."): value for name, value in wanted.items() if name.startswith("model.")}
    verify_export(tmp_path / "checkpoints/step_00000001/model", params)


def save_or_load(rank: int, world_size: int, store: Path, output_dir: Path, sharded: bool):
    """In a process of its own: saves step 1 where there is none, else reads it into another model and compares."""
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world_size)
    model, _ = tiny()
    if sharded:
        for block in [*model.model.layers, model]:
            fully_shard(block)
    optimizer = make_optimizer(model, CFG.train)
    if not checkpoint.find(output_dir):
        a_step(model, optimizer)
        # Buffers of any dtype and shape are saved as well, and bfloat16 parameters as they are.
        model.register_buffer("odd", torch.tensor(7))
        model.register_buffer("small", torch.arange(5).bfloat16())
        a_writer = writer(output_dir, tiny()[0], async_save=True)
        a_writer.save(1, model, optimizer, {})
        wait(a_writer)
        wanted = copies(model, optimizer)
        if rank == 0:
            torch.save(wanted, output_dir / "wanted.pt")
    else:
        wanted = torch.load(output_dir / "wanted.pt")
        model.register_buffer("odd", torch.tensor(0))
        model.register_buffer("small", torch.zeros(5, dtype=torch.bfloat16))
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        checkpoint.load(checkpoint.find(output_dir)[0], model, optimizer)
        assert equal(copies(model, optimizer), wanted)
    if world_size > 1:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("ranks, sharded", [(1, False), (3, False), (4, True)])
def test_a_checkpoint_is_read_bitwise_on_other_ranks_sharded_or_not(tmp_path, ranks, sharded):
    for world_size, is_sharded in [(ranks, sharded), (1, False), (2, False), (3, True)]:
        arguments = (world_size, tmp_path / f"store_{world_size}", tmp_path, is_sharded)
        torch.multiprocessing.start_processes(save_or_load, arguments, world_size, start_method="fork")
        (tmp_path / f"store_{world_size}").unlink(missing_ok=True)
    files = (checkpoint.find(tmp_path)[0] / "state").iterdir()
    assert len({path.name.partition("-model")[0] for path in files}) == ranks  # each wrote its share


def killed_at(event_number: int, output_dir: Path) -> bool:
    """Writes step 2 in a fork that is killed with -9 at the n-th change of files, if it comes there. Whether it was."""
    model, optimizer = tiny()
    a_step(model, optimizer)
    a_writer = writer(output_dir, model, keep=0)
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    torch.set_num_threads(1)
    left = event_number

    def hook(event, arguments):
        nonlocal left
        changing = event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree")
        if changing or (event == "open" and str(arguments[0]).startswith(str(output_dir))):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    try:
        a_writer.save(2, model, optimizer, {"val/loss": 1.0})
        a_writer.done()
        os._exit(0)
    except BaseException:
        os._exit(1)


@pytest.mark.slow
def test_killed_at_any_change_of_files_leaves_complete_checkpoints_only(tmp_path):
    trained_and_saved(tmp_path / "first")
    (tmp_path / "first/config.yaml").write_text(config.dump(CFG))
    newest, killed = [], True
    while killed:
        output_dir = tmp_path / f"killed_{len(newest)}"
        shutil.copytree(tmp_path / "first", output_dir)
        killed = killed_at(len(newest) + 1, output_dir)
        for folder in checkpoint.find(output_dir):
            checkpoint.load(folder, *tiny())
            AutoModelForCausalLM.from_pretrained(folder / "model")
        lock, _, resume_from = checkpoint.open_run_folder({**config.to_dict(CFG), "output_dir": str(output_dir)}, 0.0)
        lock.close()
        newest.append(checkpoint.step_of(resume_from))
        assert not list((output_dir / "checkpoints").glob("unfinished_*"))
    assert newest.count(1) > 15 and newest.count(2) > 5 and newest == sorted(newest)  # before the renaming, and after


def test_a_failed_write_is_raised_in_the_loop_and_harms_nothing(tmp_path):
    model, optimizer, a_writer = trained_and_saved(tmp_path, keep=0, async_save=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        a_writer.save(2, model, optimizer, {})
        with pytest.raises(OSError, match="step_00000002 .*File too large"):
            wait(a_writer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    checkpoint.load(tmp_path / "checkpoints/step_00000001", *tiny())


def test_a_failing_export_takes_no_state_with_it(tmp_path):
    model, optimizer, a_writer = trained_and_saved(tmp_path, keep=0)
    a_step(model, optimizer)
    wanted, a_writer.tokenizer = copies(model, optimizer), None  # which cannot be exported
    a_writer.save(2, model, optimizer, {})
    with pytest.raises(OSError, match="step_00000002"):
        a_writer.done()
    assert checkpoint.newest_complete(tmp_path).name == "step_00000002"
    other, other_optimizer = tiny()
    checkpoint.load(checkpoint.newest_complete(tmp_path), other, other_optimizer)
    assert equal(copies(other, other_optimizer), wanted)
    assert checkpoint.find_model(str(tmp_path)) == str(tmp_path / "checkpoints/step_00000001/model")
    checkpoint.make_model_folder(checkpoint.newest_complete(tmp_path), tmp_path / "model", merge=False)
    reloaded = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(reloaded.parameters(), model.parameters(), strict=True))


def test_the_best_and_the_newest_are_kept(tmp_path):
    model, optimizer = tiny()
    a_step(model, optimizer)
    a_writer = writer(tmp_path, model, keep=2)
    for step, loss in enumerate([3.0, 1.0, 5.0, 2.0, None, 6.0, 4.0], start=1):
        a_writer.save(step, model, optimizer, {} if loss is None else {"val/loss": loss})
        a_writer.done()
    assert [checkpoint.step_of(folder) for folder in checkpoint.find(tmp_path)] == [2, 4, 7]


@pytest.mark.parametrize("how", ["truncated", "overwritten", "gone"])
def test_a_corrupted_newest_checkpoint_is_an_error_and_nothing_is_deleted(tmp_path, how):
    _, _, a_writer = trained_and_saved(tmp_path, (1, 2))
    (tmp_path / "config.yaml").write_text(config.dump(CFG))
    path = tmp_path / "checkpoints/step_00000002/state/shard-00001-model-00001-of-00001.safetensors"
    content = path.read_bytes()
    path.unlink()
    if how != "gone":
        path.write_bytes(content[: len(content) // 2] if how == "truncated" else b"\xff" * len(content))
    cfg = {**config.to_dict(CFG), "output_dir": str(tmp_path)}
    lock, _, resume_from = checkpoint.open_run_folder(cfg, 0.0)
    lock.close()
    with pytest.raises(ValueError, match=f"{resume_from}/state cannot be read: .* Move {resume_from} away"):
        checkpoint.load(resume_from, *tiny())
    assert [checkpoint.step_of(folder) for folder in checkpoint.find(tmp_path)] == [1, 2]
    resume_from.rename(tmp_path / "moved_away")
    lock, _, resume_from = checkpoint.open_run_folder(cfg, 0.0)
    lock.close()
    checkpoint.load(resume_from, *tiny())
    assert checkpoint.step_of(resume_from) == 1


def test_the_command_makes_a_model_folder(tmp_path):
    model, optimizer = tiny()
    a_step(model, optimizer)
    for step, loss in [(1, 1.0), (2, 2.0), (3, 3.0)]:
        writer(tmp_path, model).save(step, model, optimizer, {"val/loss": loss})
    shutil.rmtree(tmp_path / "checkpoints/step_00000003/model")
    checkpoint.main([str(tmp_path / "checkpoints/step_00000003"), str(tmp_path / "made")])
    reloaded = LlamaForCausalLM.from_pretrained(tmp_path / "made")
    assert all(torch.equal(a, b) for a, b in zip(reloaded.parameters(), model.parameters(), strict=True))
    with pytest.raises(SystemExit, match=str(tmp_path / "made")):
        checkpoint.main([str(tmp_path / "checkpoints/step_00000001"), str(tmp_path / "made")])


def test_a_model_card_says_what_was_trained_and_nothing_of_this_machine(tmp_path):
    (tmp_path / "alice/base").mkdir(parents=True)
    mixture = f"[{{dataset: {tmp_path}/alice/chats.jsonl, args: {{validation: {tmp_path}/secret}}}}, {{dataset: a/b}}]"
    overrides = [f"model.name={tmp_path}/alice/base", f"data.dataset={mixture}", "logger.wandb.name=secret"]
    overrides += [f"tokenizer.chat_template={tmp_path}/secret.jinja", f"data.cache={tmp_path}", "train.eps=0.5"]
    (tmp_path / "config.yaml").write_text(config.dump(config.load(None, [*overrides, f"output_dir={tmp_path}"])))
    model, optimizer = tiny()
    info = {"data": "digest", "train/loss": 1.25, "val/loss": 2.5}
    writer(tmp_path, model).save(1, model, optimizer, info)
    checkpoint.make_model_folder(tmp_path / "checkpoints/step_00000001", tmp_path / "model", merge=False)
    text, again = (
        (tmp_path / f"{name}/README.md").read_text() for name in ("checkpoints/step_00000001/model", "model")
    )
    assert text == again and str(tmp_path) not in text and "alice" not in text and "secret" not in text
    card = ModelCard(text)
    assert card.data.datasets == ["a/b"] and card.data.base_model is None and "| data | chats.jsonl, a/b |" in text
    for name, value in [("base model", "base"), ("chat template", "chat_template.jinja"), ("step", 1), ("eps", 0.5),
                        ("train/loss", 1.25), ("val/loss", 2.5)]:  # fmt: skip
        assert f"| {name} | {value} |" in text
    (tmp_path / "config.yaml").write_text(config.dump(config.load(None, ["model.name=owner/base"])))
    checkpoint.write_card(tmp_path / "model", tmp_path, {})
    assert ModelCard.load(tmp_path / "model/README.md").data.base_model == "owner/base"


class FakeHub:
    """What `checkpoint.push` calls of `huggingface_hub.HfApi`; the calls are kept. `public`: repositories there."""

    def __init__(self, *public):
        self.public, self.calls = public, []

    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.calls.append((repo_id, private, exist_ok))
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def model_info(self, repo_id):
        return ModelInfo(id=repo_id, private=repo_id not in self.public)

    def upload_folder(self, repo_id, folder_path):
        self.calls.append((repo_id, Path(folder_path)))


def test_a_complete_model_is_pushed_and_never_a_private_one_to_a_public_place(tmp_path):
    trained_and_saved(tmp_path, (1, 2))
    model = tmp_path / "checkpoints/step_00000002/model"
    for folder in (tmp_path, model):
        hub = FakeHub()
        said = checkpoint.push(folder, "me/mine", True, hub)
        assert hub.calls == [("me/mine", True, True), ("me/mine", model)] and "https://huggingface.co/me/mine" in said
    hub = FakeHub("me/mine")
    with pytest.raises(ValueError, match="me/mine .*public"):
        checkpoint.push(model, "me/mine", True, hub)
    assert len(hub.calls) == 1
    checkpoint.push(model, "me/mine", False, hub)
    assert hub.calls[1:] == [("me/mine", None, True), ("me/mine", model)]
    hub = FakeHub()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="step_00000002/model .* no model-00002-of-00002.safetensors$"):
        checkpoint.push(model, "me/mine", False, hub)
    (model / "model-00002-of-00002.safetensors").touch()
    checkpoint.push(model, "me/mine", False, hub)
    (model / "tokenizer_config.json").unlink()
    for folder, missing in ((model, "tokenizer_config.json"), (tmp_path / "nowhere", "does not exist")):
        with pytest.raises(ValueError, match=f"{folder} .*{missing}"):
            checkpoint.push(folder, "me/mine", False, hub)
    assert len(hub.calls) == 2
    for arguments in (["a", "--push"], ["a", "--push", "me/mine", "--public"], ["a", "b", "--private"]):
        with pytest.raises(SystemExit, match="OWNER/NAME"):
            checkpoint.main(arguments)


def test_two_runs_do_not_write_into_one_folder(tmp_path, capsys):
    cfg = {**config.to_dict(CFG), "output_dir": str(tmp_path / "run")}
    lock, token, _ = checkpoint.open_run_folder(cfg, 0.0)
    with ThreadPoolExecutor() as pool:
        second = pool.submit(checkpoint.open_run_folder, cfg, 0.0)
        with pytest.raises(TimeoutError):
            second.result(timeout=1)
        assert f"waiting for another process that trains in {tmp_path / 'run'}" in capsys.readouterr().out
        checkpoint.wait_for_run_folder(tmp_path / "run", token)
        lock.close()
        lock, other_token, _ = second.result(timeout=30)
    assert other_token != token
    lock.close()


def test_a_node_that_does_not_see_the_run_folder_is_an_error(tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    with pytest.raises(ValueError, match="output_dir = .*elsewhere"):
        checkpoint.wait_for_run_folder(tmp_path / "elsewhere", "token")
    assert sum(slept) == 60


def test_a_stop_for_an_earlier_launch_is_removed(tmp_path):
    cfg = {**config.to_dict(CFG), "output_dir": str(tmp_path)}
    (tmp_path / "STOP").touch()
    for launched, remains in [(0.0, True), ((tmp_path / "STOP").stat().st_mtime + 1, False)]:
        lock, _, resume_from = checkpoint.open_run_folder(cfg, launched)
        lock.close()
        assert (tmp_path / "STOP").exists() == remains and resume_from is None


def test_keys_that_change_batches_or_model_may_not_differ_and_others_may():
    def differing(*overrides):
        return checkpoint.differing_keys(config.to_dict(CFG), config.to_dict(config.load(None, [*overrides])))

    assert not differing("train.max_steps=7", "parallel.strategy=fsdp", "checkpoint.every=3", "validation.every=2",
                         "logger.tensorboard.enabled=false", "cluster.gpus_per_node=4",
                         "data.cache=elsewhere")  # fmt: skip
    for override in (
        "validation.max_examples=3",
        "seed=1",
        "train.global_batch_size=8",
        "data.max_seq_length=99",
        "model.name=a",
        "train.eps=1e-3",
    ):
        assert len(differing(override)) == 1 and override.partition("=")[0] in differing(override)[0]


def test_a_run_s_folder_names_its_model_and_for_training_only_a_finished_one(tmp_path):
    (tmp_path / "run/checkpoints/step_00000003/model").mkdir(parents=True)
    run, step = str(tmp_path / "run"), str(tmp_path / "run/checkpoints/step_00000003/model")
    assert checkpoint.find_model(run) == step
    with pytest.raises(ValueError, match="has its run finished"):
        checkpoint.find_model(run, finished_only=True)
    (tmp_path / "run/model").mkdir()
    checkpoint.write_status(tmp_path / "run", "finished", 3)
    assert checkpoint.find_model(run, finished_only=True) == checkpoint.find_model(run) == f"{run}/model"
    assert checkpoint.find_model("some/model") == "some/model"  # of the Hub
    for gone in (f"{run}/gone", "results/gone/model", "./gone"):
        with pytest.raises(ValueError, match=f"{gone} does not exist"):
            checkpoint.find_model(gone)


def test_what_is_no_run_or_another_run_is_never_overwritten(tmp_path):
    def start(*overrides):
        cfg = config.load(None, [f"output_dir={tmp_path}", *overrides])
        return checkpoint.find_resume_checkpoint(config.to_dict(cfg))

    assert start() == (None, False)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="output_dir = .* holds no run"):
        start()
    (tmp_path / "config.yaml").write_text("seed: [42")
    with pytest.raises(ValueError, match="config.yaml"):
        start()
    (tmp_path / "config.yaml").write_text(config.dump(CFG).replace("learning_rate: 5.0e-06", "learning_rate: 5e-6"))
    assert start("train.max_steps=7") == (None, False)
    with pytest.raises(ValueError, match=r"seed \(42 there, 1 now\)"):
        start("seed=1")
    with pytest.raises(ValueError, match="checkpoint.resume is never"):
        start("checkpoint.resume=never")
    for state in ("failed", "stopped", "running"):  # before its first step a run has nothing to lose
        (tmp_path / "metrics.jsonl").write_text('{"step": 0, "val/loss": 2.5}\n')
        checkpoint.write_status(tmp_path, state, 0)
        assert start("seed=1") == (None, False)
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.5}\n')
        with pytest.raises(ValueError, match=r"seed \(42 there, 1 now\)"):
            start("seed=1")


def test_a_status_is_replaced_in_one_piece(tmp_path):
    checkpoint.write_status(tmp_path, "running", 3)
    assert json.loads((tmp_path / "status.json").read_text()) == {"state": "running", "step": 3, "reason": None}
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    checkpoint.write_status(tmp_path, "failed", None, "a reason")
    assert json.loads((tmp_path / "status.json").read_text()) == {"state": "failed", "step": 3, "reason": "a reason"}
