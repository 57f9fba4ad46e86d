import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from running import metrics, run  # noqa: E402


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
    run(folder, *arguments, f"output_dir={folder}/undisturbed")
    assert [*metrics(folder / "undisturbed")] == [1, 2, 3, 4, 5, 6]
    return arguments, folder / "undisturbed"
