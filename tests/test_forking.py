"""docs/forking.md: each diff applies to the files as they are, is short, and does what it says."""

import re
import shlex
import shutil
import subprocess

import pytest
import torch
from running import HOME, ROOT, metrics, run, start_in_fork, wait_for
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader

import config
import model as modeling

SECTIONS = dict(
    (title, (diff, command))
    for title, diff, command in re.findall(
        r"^## (.*?)\n.*?^```diff\n(.*?)^```\n\n```\n(.*?)\n```", (ROOT / "docs/forking.md").read_text(), re.S | re.M
    )
)
FEW = ["train.max_steps=4", "train.schedule=constant", "train.warmup_steps=0", "validation.every=4",
       "validation.max_examples=8", "validation.samples=0", "validation.exact_match=0",
       "checkpoint.every=2"]  # fmt: skip


def fork(tmp_path, title, *overrides, replace=("", "")):
    """Apply the diff to a copy of the files, and run its command with `overrides`. Returns (output_dir, output)."""
    diff, command = SECTIONS[title]
    if not (tmp_path / "fork").exists():
        (tmp_path / "fork").mkdir(parents=True)
        for path in [*ROOT.glob("*.py"), ROOT / "configs"]:
            (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / "fork" / path.name)
        subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path / "fork", check=True)
    python, name, *arguments = shlex.split(command.replace(*replace))
    arguments += [*FEW, *overrides, f"output_dir={tmp_path}/out"]
    log = tmp_path / "log"
    log.unlink(missing_ok=True)
    code = wait_for(start_in_fork(arguments, HOME, log, name=name, root=tmp_path / "fork"))
    assert python == "python" and code == 0, log.read_text()
    return tmp_path / "out", log.read_text()


def start_weights():
    """Of the quickstart's model, before any step."""
    torch.manual_seed(42)
    model = modeling.load_model(config.load(str(ROOT / "configs/quickstart.yaml"), []).model, torch.device("cpu"))
    return dict(model.named_parameters())


pytestmark = pytest.mark.slow


def test_there_are_five_changes_of_fewer_than_40_lines_each():
    assert len(SECTIONS) == 5 and all(len(diff.splitlines()) < 40 for diff, _ in SECTIONS.values())


def test_distillation_learns_the_teachers_probabilities_and_the_text(tmp_path, memorized):
    teacher = str(memorized / "model")
    out, _ = fork(tmp_path, "Another loss: distillation", replace=("results/quickstart/model", teacher))
    losses = metrics(out)
    assert losses[4] < losses[1] and not torch.equal(
        load_file(out / "model/model.safetensors")["model.norm.weight"], start_weights()["model.norm.weight"]
    )
    # a teacher that is the student says the same: what is left is half of the text's loss
    same = [f"model.name={teacher}", "model.from_scratch=false", "train.max_steps=1"]
    replace = ("results/quickstart/model", teacher)
    half = metrics(fork(tmp_path / "same", "Another loss: distillation", *same, replace=replace)[0], "val/loss")
    plain = tmp_path / "plain"
    run("configs/quickstart.yaml", *FEW, *same, f"output_dir={plain}")
    assert half[0] == pytest.approx(metrics(plain, "val/loss")[0] / 2, rel=1e-5)


def test_muon_takes_the_matrices_of_the_blocks_and_resumes(tmp_path):
    out, _ = fork(tmp_path, "Another optimizer: Muon", "train.max_steps=2")
    out, said = fork(tmp_path, "Another optimizer: Muon")
    assert "2 steps from step 3" in said and [*metrics(out)] == [1, 2, 3, 4]
    kept = HuggingFaceStorageReader(out / "checkpoints/step_00000004/state").read_metadata().state_dict_metadata
    matrices = {name for name, p in start_weights().items() if ".layers." in name and p.ndim == 2}
    assert {name for name in kept if name.endswith("momentum_buffer")} == {
        f"optimizer.{name}.momentum_buffer" for name in matrices}  # fmt: skip
    assert "optimizer.model.embed_tokens.weight.exp_avg" in kept


def test_a_spreadsheet_is_a_dataset(tmp_path):
    (tmp_path / "sheet.csv").write_text("question,answer\n" + "".join(f'"How, {i}?",So {i}.\n' for i in range(30)))
    replace = ("sheet.csv", str(tmp_path / "sheet.csv"))
    out, said = fork(tmp_path, "Another dataset: a spreadsheet", "train.max_epochs=9", replace=replace)
    assert "train: 27 conversations" in said and "validation: 3 conversations" in said and len(metrics(out)) == 4


def test_warm_up_stable_decay_falls_in_the_last_fifth(tmp_path):
    title = "Another schedule: warm-up, stable, decay"
    out, _ = fork(tmp_path, title, "train.max_steps=10", "train.schedule=wsd", "train.learning_rate=1.0")
    assert [*metrics(out, "train/learning_rate").values()] == pytest.approx([1.0] * 9 + [0.5])


def test_frozen_layers_stay_as_they_are_and_the_others_learn(tmp_path):
    out, _ = fork(tmp_path, "Frozen layers")
    before, after = start_weights(), load_file(out / "model/model.safetensors")
    unchanged = {name for name in after if torch.equal(after[name], before[name])}
    assert unchanged == {n for n in after if n.startswith(("model.embed_tokens", "model.layers.0."))}
