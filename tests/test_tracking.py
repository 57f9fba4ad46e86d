import sys
import types

import config
import tracking


def test_all_starts_of_a_run_are_one_run_of_wandb(tmp_path, monkeypatch):
    made = []

    def init(id, resume, **_):
        assert resume == "allow"
        made.append(id or f"new{len(made)}")
        return types.SimpleNamespace(id=made[-1])

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for start in (0, 4, 8, 0):
        tracking.start_wandb(config.Wandb(), {}, tmp_path / "wandb_id", start)
    assert made == ["new0", "new0", "new0", "new3"]
