"""Checkpoints: what is read is what was written, damage is detected, an incomplete checkpoint is not listed."""

import errno
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fusebert.model.config import BertConfig
from fusebert.model.pretraining import BertForPreTraining
from fusebert.train.run.checkpoint import (
    FILES,
    CheckpointError,
    TrainerState,
    clean_up,
    last_good,
    list_checkpoints,
    load_checkpoint,
    read_state,
    save_checkpoint,
)
from fusebert.train.step.optim import make_optimizer


def trained(seed: int, hidden_size: int = 16) -> tuple[BertForPreTraining, torch.optim.AdamW]:
    """A model and an optimiser after two steps on random gradients."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=20,
        hidden_size=hidden_size,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
    )
    model = BertForPreTraining(config)
    optimizer = make_optimizer(model, 1e-2, 0.01)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return model, optimizer


def test_everything_comes_back(tmp_path: Path) -> None:
    model, optimizer = trained(seed=0)
    state = TrainerState(step=7, batches=14, tokens=99, elapsed_s=1.5, flops=10**18, identity={"--seed": 0})
    path = save_checkpoint(tmp_path, model, optimizer, state)

    other, other_optimizer = trained(seed=1)
    assert read_state(path) == state
    load_checkpoint(path, other, other_optimizer)
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p, q), name
        assert optimizer.state[p].keys() == other_optimizer.state[q].keys()
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, other_optimizer.state[q][key]), (name, key)


def test_before_the_first_step(tmp_path: Path) -> None:
    model, _ = trained(seed=0)
    path = save_checkpoint(tmp_path, model, make_optimizer(model, 1e-2, 0.01), TrainerState())
    other, other_optimizer = trained(seed=1)
    load_checkpoint(path, other, other_optimizer)
    assert not other_optimizer.state


def test_no_pickle(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, *trained(seed=0), TrainerState(step=1))
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}
    for file in path.glob("*.safetensors"):
        content = file.read_bytes()
        json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    model, optimizer = trained(seed=0)
    for step in (9, 10, 11, 11):
        save_checkpoint(tmp_path, model, optimizer, TrainerState(step=step))
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000011", "step-00000010"]
    assert len(list(tmp_path.iterdir())) == 2
    assert list_checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize("name", [*FILES, "trainer.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_damage_is_noticed(tmp_path: Path, name: str, damage: str) -> None:
    path = save_checkpoint(tmp_path, *trained(seed=0), TrainerState(step=1))
    content = bytearray((path / name).read_bytes())
    if damage == "missing":
        (path / name).unlink()
    elif damage == "cut":
        (path / name).write_bytes(content[:-10])
    else:
        content[len(content) // 2] ^= 0x80
        (path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged|not a whole checkpoint"):
        read_state(path)


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, *trained(seed=0), TrainerState(step=1))
    with pytest.raises(CheckpointError, match="another model"):
        load_checkpoint(path, *trained(seed=0, hidden_size=32))


@pytest.mark.parametrize("failing", range(6))
def test_no_space_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """The disk is full at one of the writes: the error is the system's, and nothing of the attempt is left."""
    model, optimizer = trained(seed=0)
    first = save_checkpoint(tmp_path, model, optimizer, TrainerState(step=1))
    calls = 0
    real = os.fsync

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, model, optimizer, TrainerState(step=2))
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [first]
    assert read_state(first).step == 1


def test_safetensors_reports_the_systems_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors wraps errno in a message; a full disk must not look like a bug in safetensors."""
    original = safetensors.torch.save_file
    monkeypatch.setattr(safetensors.torch, "save_file", lambda tensors, path, **_: original(tensors, path / "nowhere"))
    with pytest.raises(OSError, match="No such file or directory") as caught:
        save_checkpoint(tmp_path, *trained(seed=0), TrainerState(step=1))
    assert caught.value.errno == errno.ENOENT


def test_leftovers_of_a_crash_are_removed_and_never_listed(tmp_path: Path) -> None:
    leftover = tmp_path / ".step-00000005.partial-99999999"  # no such process
    leftover.mkdir(parents=True)
    assert list_checkpoints(tmp_path) == []
    save_checkpoint(tmp_path, *trained(seed=0), TrainerState(step=6))
    assert not leftover.exists()


EDITS: dict[str, tuple[str, object]] = {
    "another step": ("step", 2),
    "more batches": ("batches", 4),
    "other lanes": ("lanes", 2),
    "a text": ("tokens", "99"),
    "a truth": ("batches", True),
    "a part": ("flops", 1.5),
    "below zero": ("elapsed_s", -1.0),
    "no number": ("train_s", float("nan")),
    "a list": ("identity", []),
    "half an evaluation": ("first_evaluation", {"mlm_loss": 1.0}),
    "another length": ("length", {"hours": 1}),
    "a scale in words": ("loss_scale", {"scale": "big"}),
    "an unknown field": ("colour", 1),
    "no lane": ("lanes", 0),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("checksum", ["left", "made anew"])
def test_an_edited_state_is_refused(tmp_path: Path, name: str, checksum: str) -> None:
    """The checksum finds every edit. Without one, as in older versions, impossible values are found."""
    path = save_checkpoint(tmp_path, *trained(seed=0), TrainerState(step=1, batches=1, lanes=1))
    content = json.loads((path / "trainer.json").read_text())
    field, value = EDITS[name]
    content["state"][field] = value
    if checksum == "made anew":
        content["version"] = 2
        del content["crc32"]
    (path / "trainer.json").write_text(json.dumps(content))
    if checksum == "made anew" and name in ("more batches", "other lanes"):
        read_state(path)  # possible values: `resume.find_checkpoint` compares them with the batch sizes
        return
    with pytest.raises(CheckpointError, match=r"damaged|not possible|not a whole checkpoint|is of step"):
        read_state(path)


@pytest.mark.parametrize("name", [*FILES, "trainer.json"])
@pytest.mark.parametrize("what", ["fifo", "folder", "deep", "long"])
def test_a_file_of_another_kind_is_refused_at_once(tmp_path: Path, name: str, what: str) -> None:
    path = save_checkpoint(tmp_path, *trained(seed=0), TrainerState(step=1))
    (path / name).unlink()
    if what == "fifo":
        os.mkfifo(path / name)
    elif what == "folder":
        (path / name).mkdir()
    else:
        (path / name).write_text("[" * 100_000 if what == "deep" else "9" * 5_000)
    with pytest.raises(CheckpointError):
        read_state(path)
    assert last_good(tmp_path) == "there is no good checkpoint"


@pytest.mark.parametrize("kill", ["first", "second"])
def test_a_kill_while_a_checkpoint_is_replaced_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill: str
) -> None:
    """Killed before the first or before the second of the two renames: the step is there afterwards."""
    model, optimizer = trained(seed=0)
    save_checkpoint(tmp_path, model, optimizer, TrainerState(step=3))
    child = os.fork()
    if child == 0:
        renames = [0]
        original = os.rename

        def rename(source: Path, target: Path) -> None:
            renames[0] += 1
            if renames[0] == (1 if kill == "first" else 2):
                os._exit(9)
            original(source, target)

        os.rename = rename  # type: ignore[assignment]
        save_checkpoint(tmp_path, model, optimizer, TrainerState(step=3, tokens=5))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    clean_up(tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.name == "step-00000003"
    assert read_state(path).step == 3


def test_folders_of_living_processes_are_left_alone(tmp_path: Path) -> None:
    names = [f".step-00000005.{what}-{os.getppid()}" for what in ("partial", "replaced")]
    for name in [*names, f".step-00000004.partial-{os.getpid()}", ".step-00000003.partial-99999999"]:
        (tmp_path / name).mkdir(parents=True)
    save_checkpoint(tmp_path, *trained(seed=0), TrainerState(step=6))
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "step-00000006"]


def test_damaged_checkpoints_of_later_steps_do_not_push_out_good_ones(tmp_path: Path) -> None:
    """A run that fell back to an earlier checkpoint keeps what it saves."""
    for step in (90, 100):
        (tmp_path / f"step-{step:08d}").mkdir()
    (tmp_path / f"step-{'9' * 5000}"[:250]).mkdir()
    model, optimizer = trained(seed=0)
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, model, optimizer, TrainerState(step=step))
    assert [read_state(tmp_path / f"step-{step:08d}").step for step in (20, 30)] == [20, 30]
    assert not (tmp_path / "step-00000010").exists()


@pytest.mark.parametrize("what", ["file", "link"])
def test_whatever_has_the_name_of_a_checkpoint_is_replaced(tmp_path: Path, what: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    root = tmp_path / "checkpoints"
    root.mkdir()
    if what == "file":
        (root / "step-00000001").write_text("")
    else:
        (root / "step-00000001").symlink_to(tmp_path / "elsewhere")
    path = save_checkpoint(root, *trained(seed=0), TrainerState(step=1))
    assert read_state(path).step == 1
    assert list(root.iterdir()) == [path]
    assert (tmp_path / "elsewhere").exists()


def test_versions(tmp_path: Path) -> None:
    """Version 1 has no lanes (it used one), and generator states that are no longer needed."""
    path = save_checkpoint(tmp_path, *trained(seed=0), TrainerState(step=1, lanes=4))
    content = json.loads((path / "trainer.json").read_text())
    content["version"] = 1
    del content["state"]["lanes"], content["state"]["skipped"], content["crc32"]
    (path / "trainer.json").write_text(json.dumps(content))
    assert read_state(path) == TrainerState(step=1, lanes=1)
    content["version"] = 99
    (path / "trainer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="format version 99"):
        read_state(path)
