import resource
from pathlib import Path

import pytest
import torch

from cbtm_pipeline.training import checkpoint
from made_training import log_lines

PRINT = "f" * 32


class Tied(torch.nn.Module):
    """Two layers that share a matrix, and a buffer."""

    def __init__(self, value: float = 0.0):
        super().__init__()
        self.a, self.b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight
        self.register_buffer("counter", torch.tensor([value], dtype=torch.bfloat16))


def make(steps: int, rng_seed: int = 0) -> tuple[Tied, torch.optim.Optimizer]:
    torch.manual_seed(rng_seed)
    model = Tied(float(steps))
    optimizer = torch.optim.AdamW(
        [{"params": [model.a.weight], "weight_decay": 0.1}, {"params": [model.a.bias], "weight_decay": 0.0}],
        lr=0.1,
        fused=True,
    )
    for _ in range(steps):
        model.b(model.a(torch.ones(3))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(folder: Path, *steps: int, fingerprint: str = PRINT) -> None:
    for step in steps:
        checkpoint.save(folder, step, fingerprint, checkpoint.capture(*make(step)))


def same(a: checkpoint.Tensors, b: checkpoint.Tensors) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def test_what_is_saved_is_restored_and_goes_on_the_same(tmp_path):
    save(tmp_path, 3)
    state = checkpoint.load(tmp_path, PRINT)
    assert state is not None
    assert state.step == 3
    assert same(state.tensors, checkpoint.capture(*make(3)))
    assert (
        sum(name.startswith("model.") for name in state.tensors) == 3
    )  # the shared matrix once, bias, buffer
    model, optimizer = make(0, rng_seed=1)
    checkpoint.restore(state.tensors.items(), model, optimizer)
    for _ in range(2):
        model.b(model.a(torch.ones(3))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.get_buffer("counter").add_(2)
    assert same(checkpoint.capture(model, optimizer), checkpoint.capture(*make(5)))


def test_a_state_before_the_first_step_has_no_optimizer_tensors(tmp_path):
    save(tmp_path, 0)
    state = checkpoint.load(tmp_path, PRINT)
    assert state is not None
    checkpoint.restore(state.tensors.items(), *make(0))
    assert not any(name.startswith("optimizer") for name in state.tensors)


def test_the_two_newest_are_kept(tmp_path):
    save(tmp_path, 2, 9, 10, 100)
    assert [path.name for path in checkpoint.candidates(tmp_path)] == [
        "step-00000100.safetensors",
        "step-00000010.safetensors",
    ]


def test_nothing_saved(tmp_path):
    assert checkpoint.load(tmp_path / "absent", PRINT) is None
    checkpoint.discard(tmp_path / "absent")


def test_damaged_newest_falls_back_and_is_removed(tmp_path):
    save(tmp_path, 1, 2)
    newest = checkpoint.candidates(tmp_path)[0]
    newest.write_bytes(newest.read_bytes()[:-1])
    with log_lines() as lines:
        state = checkpoint.load(tmp_path, PRINT)
    assert state is not None
    assert state.step == 1
    assert not newest.exists()
    assert "looking for the one before" in lines[0]


def test_all_damaged_is_an_error_and_deletes_nothing(tmp_path):
    save(tmp_path, 1, 2)
    for path in checkpoint.candidates(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"step-00000002.*damaged.*delete .* to train this expert from the start"
    ):
        checkpoint.load(tmp_path, PRINT)
    assert len(checkpoint.candidates(tmp_path)) == 2


def test_state_of_another_training_is_removed(tmp_path):
    folder = tmp_path / "state"
    save(folder, 1, 2, fingerprint="0" * 32)
    (folder / "metrics.jsonl").write_text("{}")
    with log_lines() as lines:
        assert checkpoint.load(folder, PRINT) is None
    assert "plan, data or seed model changed" in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_discard_after_a_discard_that_was_killed(tmp_path):
    folder = tmp_path / "state"
    save(folder, 1)
    folder.rename(tmp_path / ".state-discarded")
    save(folder, 2)
    checkpoint.discard(folder)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_names_the_file_and_keeps_the_state_before(tmp_path):
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="too large") as error:
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.filename == str(tmp_path / "step-00000002.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.safetensors"]


@pytest.mark.parametrize("change", ["flip", "truncate"])
def test_damage_anywhere_is_noticed(tmp_path, change):
    save(tmp_path, 2)
    path = checkpoint.candidates(tmp_path)[0]
    good, expected = path.read_bytes(), checkpoint.load(tmp_path, PRINT)
    assert expected is not None
    n_noticed, places = 0, range(0, len(good), 3)
    for i in places:
        path.write_bytes(
            good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :] if change == "flip" else good[:i]
        )
        try:
            state = checkpoint.load(tmp_path, PRINT)
        except ValueError:
            n_noticed += 1
            continue
        # a byte without a meaning, such as the blanks that pad the header
        assert state is not None
        assert same(state.tensors, expected.tensors)
    assert n_noticed == len(places) if change == "truncate" else n_noticed > 0.95 * len(places)
