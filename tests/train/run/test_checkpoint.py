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
    monkeypatch.setattr(safetensors.torch, "save_file", lambda tensors, path: original(tensors, path / "nowhere"))
    with pytest.raises(OSError, match="No such file or directory") as caught:
        save_checkpoint(tmp_path, *trained(seed=0), TrainerState(step=1))
    assert caught.value.errno == errno.ENOENT


def test_leftovers_of_a_crash_are_removed_and_never_listed(tmp_path: Path) -> None:
    leftover = tmp_path / ".step-00000005.partial-1"
    leftover.mkdir(parents=True)
    assert list_checkpoints(tmp_path) == []
    save_checkpoint(tmp_path, *trained(seed=0), TrainerState(step=6))
    assert not leftover.exists()


def test_versions(tmp_path: Path) -> None:
    """Version 1 has no lanes (it used one), and generator states that are no longer needed."""
    path = save_checkpoint(tmp_path, *trained(seed=0), TrainerState(step=1, lanes=4))
    content = json.loads((path / "trainer.json").read_text())
    content["version"] = 1
    del content["state"]["lanes"]
    (path / "trainer.json").write_text(json.dumps(content))
    assert read_state(path) == TrainerState(step=1, lanes=1)
    content["version"] = 99
    (path / "trainer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="format version 99"):
        read_state(path)
