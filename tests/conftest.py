import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from running import metrics, run  # noqa: E402

# The tests are of one process and of several, on any machine; what needs a GPU is in test_gpu.py
os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: trains with several ranks or several times, kills runs, or runs forks")


@pytest.fixture(scope="session")
def two_epochs(tmp_path_factory):
    """Arguments of a run of six steps, two epochs with a smaller last batch, and the folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("two_epochs")
    with open(folder / "chats.jsonl", "w") as file:
        for i in range(25):
            chat = [{"role": "user", "content": f"Say {'la ' * i}"}, {"role": "assistant", "content": "la " * (i + 1)}]
            file.write(json.dumps({"messages": chat}) + "\n")
    arguments = [
        "configs/quickstart.yaml", f"data.dataset={folder}/chats.jsonl", "data.args.validation=0.2",
        "train.global_batch_size=8", "train.max_epochs=2", "train.max_steps=null", "validation.every=2",
        "validation.exact_match=0", "validation.samples=0", "checkpoint.every=1", "checkpoint.keep=1",
    ]  # fmt: skip
    run(*arguments, f"output_dir={folder}/undisturbed")
    assert [*metrics(folder / "undisturbed")] == [1, 2, 3, 4, 5, 6]
    return arguments, folder / "undisturbed"


ROLES = ("user", "assistant")
QUESTIONS = [
    ([("Where is Paris?", "In France.")], ["France", "in France"]),
    ([("Where is Rome?", "It is in Italy.")], ["Italy", "in Italy"]),
    ([("Where is Oslo?", "In Norway."), ("And Lima?", "In Peru.")], ["Peru"]),
    ([("Who are you?", "A small model.")], ["a small model"]),
]


@pytest.fixture(scope="session")
def memorized(tmp_path_factory):
    """The output_dir of a run that has learned four conversations by heart, and their file."""
    folder = tmp_path_factory.mktemp("memorized")
    with open(folder / "chats.jsonl", "w") as file:
        for turns, answers in QUESTIONS:
            messages = [{"role": r, "content": t} for turn in turns for r, t in zip(ROLES, turn, strict=True)]
            file.write(json.dumps({"messages": messages, "answers": answers}) + "\n")
    said = run(
        "configs/quickstart.yaml", f"output_dir={folder}/run", f"data.dataset={folder}/chats.jsonl",
        f"data.args.validation={folder}/chats.jsonl", "train.global_batch_size=4", "train.max_steps=60",
        "train.learning_rate=1e-2", "validation.every=60", "validation.exact_match=4", "validation.samples=1",
        "checkpoint.every=null",
    )  # fmt: skip
    (folder / "said").write_text(said)
    return folder / "run"
