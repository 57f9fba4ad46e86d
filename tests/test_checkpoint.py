import contextlib
import enum
import io
import json
import os
import pickle
import resource
import shutil
import signal
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import checkpoint
import config
import model as modelling

CFG = config.load(None, [])


def tiny():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
    )
    return model, modelling.make_optimizer(model, CFG.train)


def a_step(model, optimizer):
    model(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def writer(output_dir, model, keep=9, asynchronous=False):
    empty = modelling.skeleton(model.config, model.generation_config, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained("configs/quickstart")
    return checkpoint.Writer(output_dir, keep, asynchronous, 0, empty, tokenizer, [3])


def copies(model, optimizer):
    state = checkpoint.state_of(model, optimizer)
    return {f"{kind}.{name}": torch.utils._pytree.tree_map(lambda t: t.clone(), value)
            for kind, part in state.items() for name, value in part.items()}  # fmt: skip


def equal(a, b):
    flat = [torch.utils._pytree.tree_leaves(x) for x in (a, b)]
    return a.keys() == b.keys() and all(torch.equal(x, y) for x, y in zip(*flat, strict=True))


def wait(a_writer):
    while not a_writer.done(0.1):
        pass


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_holds_the_state_of_its_step_whatever_the_loop_does_meanwhile(tmp_path, asynchronous):
    model, optimizer = tiny()
    a_step(model, optimizer)
    wanted, a_writer = copies(model, optimizer), writer(tmp_path, model, asynchronous=asynchronous)
    a_writer.save(1, model, optimizer, {})
    a_step(model, optimizer)
    assert not equal(copies(model, optimizer), wanted)
    wait(a_writer)
    other, other_optimizer = tiny()
    checkpoint.load(tmp_path / "checkpoints/step_00000001", other, other_optimizer)
    assert equal(copies(other, other_optimizer), wanted)
    weights = {name.removeprefix("model."): value for name, value in wanted.items() if name.startswith("model.")}
    modelling.compare(tmp_path / "checkpoints/step_00000001/model", weights)


def killed_at(event_number: int, output_dir: Path) -> bool:
    """In a fork: writes step 2 and keeps nothing older; killed with -9 at the n-th change of files. Whether it was."""
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


def test_killed_at_any_change_of_files_leaves_whole_checkpoints_only(tmp_path):
    model, optimizer = tiny()
    a_step(model, optimizer)
    writer(tmp_path / "first", model).save(1, model, optimizer, {"val/loss": 2.0})
    newest, killed = [], True
    while killed:
        output_dir = tmp_path / f"killed_{len(newest)}"
        shutil.copytree(tmp_path / "first", output_dir)
        killed = killed_at(len(newest) + 1, output_dir)
        found = checkpoint.find(output_dir)
        assert found and [checkpoint.damage(folder) for folder in found] == [None] * len(found)
        checkpoint.load(found[-1], *tiny())
        newest.append(checkpoint.step_of(found[-1]))
        checkpoint.clear_leftovers(output_dir)
        assert not list((output_dir / "checkpoints").glob("unfinished_*"))
    assert newest.count(1) > 15 and newest.count(2) > 5 and newest == sorted(newest)  # before the renaming, and after


def test_a_disk_that_takes_no_more_is_an_error_that_says_so_and_harms_nothing(tmp_path):
    model, optimizer = tiny()
    a_step(model, optimizer)
    a_writer = writer(tmp_path, model, keep=0, asynchronous=True)
    a_writer.save(1, model, optimizer, {})
    wait(a_writer)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        a_writer.save(2, model, optimizer, {})
        with pytest.raises(OSError, match="checkpoint of step 2 could not be written below .*free there: .*GiB"):
            wait(a_writer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    checkpoint.load(tmp_path / "checkpoints/step_00000001", *tiny())


def test_the_best_and_the_newest_are_kept(tmp_path):
    model, optimizer = tiny()
    a_step(model, optimizer)
    a_writer = writer(tmp_path, model, keep=2)
    for step, loss in enumerate([3.0, 1.0, 2.0, None, 4.0], start=1):
        a_writer.save(step, model, optimizer, {} if loss is None else {"val/loss": loss})
        a_writer.done()
    assert [checkpoint.step_of(folder) for folder in checkpoint.find(tmp_path)] == [2, 3, 5]


@pytest.mark.parametrize(
    "name", ["state/__0_0.distcp", "state/.metadata", "model/model.safetensors", "model/tokenizer.json", "metrics.json"]
)
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_checkpoint_is_passed_over_and_moved_aside(tmp_path, name, how):
    model, optimizer = tiny()
    a_step(model, optimizer)
    for step in (1, 2):
        writer(tmp_path, model).save(step, model, optimizer, {})
    path = tmp_path / "checkpoints/step_00000002" / name
    content = path.read_bytes()
    path.unlink()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    assert checkpoint.newest_whole(tmp_path).name == "step_00000001"
    assert "step_00000002 was damaged" in " ".join(checkpoint.clear_leftovers(tmp_path))
    names = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    assert names == ["damaged_step_00000002", "step_00000001"]


@pytest.mark.parametrize("name", ["state/.metadata", "metrics.json", "model/config.json", "model/model.safetensors"])
def test_whatever_bit_is_wrong_the_checkpoint_is_called_damaged_and_nothing_breaks(tmp_path, name, capsys):
    model, optimizer = tiny()
    a_step(model, optimizer)
    for step in (1, 2):
        writer(tmp_path, model).save(step, model, optimizer, {})
    path, random = tmp_path / "checkpoints/step_00000002" / name, Random(0)
    content = path.read_bytes()
    for _ in range(40):
        wrong = bytearray(content)
        wrong[random.randrange(min(len(wrong), 3000))] ^= 1 << random.randrange(8)
        path.write_bytes(wrong)
        found = checkpoint.newest_whole(tmp_path).name
        if name == "metrics.json":  # which has no checksum of its own: a figure may be another one
            assert found in ("step_00000001", "step_00000002")
            continue
        assert found == "step_00000001"
    with contextlib.suppress(SystemExit):
        checkpoint.main([str(tmp_path)])
    assert "newest whole" in capsys.readouterr().out


def test_the_command_lists_the_best_finds_a_changed_byte_and_makes_a_model_folder(tmp_path, capsys):
    model, optimizer = tiny()
    a_step(model, optimizer)
    for step, loss in [(1, 1.0), (2, 2.0)]:
        writer(tmp_path, model).save(step, model, optimizer, {"val/loss": loss})
    checkpoint.main([str(tmp_path)])
    assert "best: step_00000001, newest whole: step_00000002" in capsys.readouterr().out
    shutil.copytree(checkpoint.find(tmp_path)[0] / "model", tmp_path / "model")
    assert checkpoint.list_checkpoints(tmp_path) and "model  whole" in capsys.readouterr().out
    os.truncate(tmp_path / "model/model.safetensors", 1000)
    assert not checkpoint.list_checkpoints(tmp_path)
    assert "model  DAMAGED: model/model.safetensors is damaged" in capsys.readouterr().out
    checkpoint.main([str(tmp_path / "checkpoints/step_00000001"), str(tmp_path / "made")])
    reloaded = LlamaForCausalLM.from_pretrained(tmp_path / "made")
    assert all(torch.equal(a, b) for a, b in zip(reloaded.parameters(), model.parameters(), strict=True))
    path = tmp_path / "checkpoints/step_00000002/state/__0_0.distcp"
    content = bytearray(path.read_bytes())
    value = optimizer.state[model.get_input_embeddings().weight]["exp_avg"].numpy().tobytes()[:64]
    content[bytes(content).index(value) + 30] ^= 1
    path.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        checkpoint.main([str(tmp_path)])
    said = capsys.readouterr().out
    assert (
        ended.value.code == 1 and "step_00000002" in said.split("DAMAGED")[0] and "newest whole: step_00000001" in said
    )


def test_a_list_of_contents_that_would_run_code_is_not_read(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (tmp_path / "state").mkdir()
    (tmp_path / "state/.metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="posix.system"):
        checkpoint.load(tmp_path, *tiny())
    module = b"torch.distributed.checkpoint.filesystem"  # which imports os
    named = b"\x80\x04\x8c%c%s\x8c\x09os.system\x93" % (len(module), module)
    command = f"touch {tmp_path / 'ran'}".encode()
    (tmp_path / "state/.metadata").write_bytes(named + b"\x8c%c%s\x85R." % (len(command), command))
    with pytest.raises(ValueError, match="os.system"):
        checkpoint.load(tmp_path, *tiny())
    assert not (tmp_path / "ran").exists()
    (tmp_path / "state/.metadata").write_bytes(as_other_pythons_pickle(torch.distributed.checkpoint.Metadata, "mro"))
    with pytest.raises(ValueError, match="asks for mro"):
        checkpoint.load(tmp_path, *tiny())
    metadata = torch.distributed.checkpoint.metadata.BytesStorageMetadata()  # what torch would unpickle without a word
    (tmp_path / "state/.metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="BytesStorageMetadata, which is no part of a checkpoint"):
        checkpoint.load(tmp_path, *tiny())
    (tmp_path / "state/.metadata").write_bytes(b"")
    with pytest.raises(ValueError, match="state cannot be read"):
        checkpoint.read_weights(tmp_path)


def as_other_pythons_pickle(value, attribute=None) -> bytes:
    """As 3.11.0 to 3.11.3 pickle a member of an enum (or another attribute), and 3.13 a path."""

    class Pickler(pickle.Pickler):
        def reducer_override(self, part):
            return (getattr, (type(part), part.name)) if isinstance(part, enum.Enum) else NotImplemented

    class Attribute:
        def __reduce__(self):
            return getattr, (value, attribute)

    file = io.BytesIO()
    Pickler(file, protocol=3).dump(Attribute() if attribute else value)
    return file.getvalue().replace(b"cpathlib\n", b"cpathlib._local\n")


def test_a_checkpoint_that_another_python_has_written_is_read(tmp_path):
    model, optimizer = tiny()
    a_step(model, optimizer)
    writer(tmp_path, model).save(1, model, optimizer, {})
    state = checkpoint.find(tmp_path)[0] / "state"
    metadata = checkpoint.read_metadata(state)
    pickled = as_other_pythons_pickle(metadata)
    assert b"getattr" in pickled and b"pathlib._local" in pickled
    (state / ".metadata").write_bytes(pickled)
    assert checkpoint.read_metadata(state) == metadata


def test_keys_that_change_batches_or_model_may_not_differ_and_others_may():
    def differing(*overrides):
        return checkpoint.differing_keys(config.to_dict(CFG), config.to_dict(config.load(None, [*overrides])))

    assert not differing("train.max_steps=7", "parallel.strategy=fsdp", "checkpoint.every=3", "validation.every=2",
                         "logger.tensorboard.enabled=false", "cluster.gpus_per_node=4")  # fmt: skip
    for override in ("seed=1", "train.global_batch_size=8", "data.max_seq_length=99", "model.name=a", "train.eps=1e-3"):
        assert len(differing(override)) == 1 and override.partition("=")[0] in differing(override)[0]


def test_what_is_no_run_or_another_run_is_never_overwritten(tmp_path):
    def start(*overrides):
        return checkpoint.where_to_start(config.to_dict(config.load(None, [f"output_dir={tmp_path}", *overrides])))

    assert start() == (None, False)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no run; name another folder"):
        start()
    (tmp_path / "config.yaml").write_text("seed: [42")
    with pytest.raises(ValueError, match="config.yaml: is not YAML"):
        start()
    (tmp_path / "config.yaml").write_text(config.dump(CFG).replace("learning_rate: 5.0e-06", "learning_rate: 5e-6"))
    assert start("train.max_steps=7") == (None, False)
    with pytest.raises(ValueError, match=r"seed \(42 there, 1 now\)"):
        start("seed=1")
    with pytest.raises(ValueError, match="holds a run already, and checkpoint.resume is never"):
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
