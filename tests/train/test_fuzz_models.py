"""Readers of random and of damaged models, checkpoints, tables and logs: the content, or an error of one line."""

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import SMALL
from small_corpus import make_corpus

pytest.importorskip("hypothesis")
import hypothesis
from fuzzing import DAMAGE, JSON, KEPT, LINE, TEXT, check_message, damaged, few, places, with_change
from hypothesis import strategies as st

from fusebert.model import BertForPreTraining, from_hf
from fusebert.train.errors import UserError
from fusebert.train.run import checkpoint
from fusebert.train.run.log import read_log
from fusebert.train.run.manifest import options_to_continue, read_manifest
from fusebert.train.run.pretrain import pretrain
from fusebert.train.run.settings import PretrainSettings
from fusebert.train.tasks.rows import Columns, read_rows


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    place = tmp_path_factory.mktemp("run")
    pretrain(PretrainSettings(**{**SMALL, "data": make_corpus(place), "out": place / "run", "steps": 1}), "RESUME")
    return place / "run"


def is_read(path: Path) -> bool:
    """Whether a checkpoint is read."""
    try:
        checkpoint.read_state(path)
    except checkpoint.CheckpointError as error:
        check_message(error, path)
        return False
    return True


@few
@hypothesis.given(
    name=st.sampled_from([*checkpoint.FILES, "trainer.json"]),
    damage=DAMAGE.filter(bool),
    kept=KEPT,
    header=st.booleans(),
)
def test_checkpoints_with_other_bytes(
    out: Path, tmp_path: Path, name: str, damage: list[tuple[float, int]], kept: float, header: bool
) -> None:
    """In the safetensors files often in the header, which is a small part of them."""
    source = checkpoint.list_checkpoints(out / "checkpoints")[0]
    path = tmp_path / source.name
    shutil.copytree(source, path, dirs_exist_ok=True)
    original = (source / name).read_bytes()
    start = 8 + int.from_bytes(original[:8], "little") if header and name in checkpoint.FILES else len(original)
    content = damaged(original[:start], damage, kept) + original[start:]
    (path / name).write_bytes(content)
    if is_read(path) and content != original:
        assert name == "trainer.json"
        assert json.loads(content) == json.loads(original)


@few
@hypothesis.given(data=st.data(), new=JSON)
def test_checkpoints_with_another_value(out: Path, tmp_path: Path, data: Any, new: Any) -> None:
    source = checkpoint.list_checkpoints(out / "checkpoints")[0]
    path = tmp_path / source.name
    shutil.copytree(source, path, dirs_exist_ok=True)
    content = json.loads((source / "trainer.json").read_bytes())
    changed = with_change(content, data.draw(st.sampled_from(places(content))), new)
    (path / "trainer.json").write_text(json.dumps(changed))
    assert not is_read(path) or changed == content or content["version"] != changed["version"]


def load(folder: Path) -> None:
    """Loads a model, which is finite or as its file, or an error names the file."""
    try:
        model = from_hf(folder)
    except ValueError as error:
        named = str(folder) in str(error)
    else:
        named = isinstance(model, BertForPreTraining)
    assert named


@few
@hypothesis.given(data=st.data(), new=JSON)
def test_configs_with_another_value(out: Path, tmp_path: Path, data: Any, new: Any) -> None:
    shutil.copytree(out / "hf", tmp_path / "hf", dirs_exist_ok=True)
    config = json.loads((out / "hf" / "config.json").read_bytes())
    changed = with_change(config, data.draw(st.sampled_from(places(config))), new)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(changed))
    load(tmp_path / "hf")


@few
@hypothesis.given(name=st.sampled_from(["config.json", "model.safetensors"]), damage=DAMAGE, kept=KEPT)
def test_models_with_other_bytes(
    out: Path, tmp_path: Path, name: str, damage: list[tuple[float, int]], kept: float
) -> None:
    shutil.copytree(out / "hf", tmp_path / "hf", dirs_exist_ok=True)
    original = (out / "hf" / name).read_bytes()
    start = 8 + int.from_bytes(original[:8], "little") if name == "model.safetensors" else len(original)
    (tmp_path / "hf" / name).write_bytes(damaged(original[:start], damage, kept) + original[start:])
    load(tmp_path / "hf")


@few
@hypothesis.given(data=st.data(), new=JSON)
def test_headers_with_another_value(out: Path, tmp_path: Path, data: Any, new: Any) -> None:
    shutil.copytree(out / "hf", tmp_path / "hf", dirs_exist_ok=True)
    original = (out / "hf" / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(original[:8], "little")
    header = json.loads(original[8:end])
    changed = json.dumps(with_change(header, data.draw(st.sampled_from(places(header))), new)).encode()
    content = len(changed).to_bytes(8, "little") + changed + original[end:]
    (tmp_path / "hf" / "model.safetensors").write_bytes(content)
    load(tmp_path / "hf")


@few
@hypothesis.given(data=st.data(), new=JSON, damage=DAMAGE, kept=KEPT)
def test_manifests_of_runs(
    out: Path, tmp_path: Path, data: Any, new: Any, damage: list[tuple[float, int]], kept: float
) -> None:
    content = json.loads((out / "run.json").read_bytes())
    changed = json.dumps(with_change(content, data.draw(st.sampled_from(places(content))), new)).encode()
    (tmp_path / "run.json").write_bytes(damaged(changed, damage, kept))
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True, exist_ok=True)
    for read in (read_manifest, options_to_continue):
        try:
            assert isinstance(read(tmp_path), dict)
        except UserError as error:
            check_message(error, tmp_path)


@few
@hypothesis.given(damage=DAMAGE, kept=KEPT)
def test_logs(out: Path, tmp_path: Path, damage: list[tuple[float, int]], kept: float) -> None:
    (tmp_path / "log.jsonl").write_bytes(damaged((out / "log.jsonl").read_bytes(), damage, kept))
    for record in read_log(tmp_path / "log.jsonl"):
        assert {"kind", "step"} <= record.keys()


def table(rows: list[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows([["text", "label"], *rows])
    return text.getvalue().encode("utf-8", "surrogatepass")


@few
@hypothesis.given(
    suffix=st.sampled_from([".txt", ".tsv", ".csv", ".jsonl"]),
    content=st.lists(TEXT | LINE, max_size=8).map(b"\n".join)
    | st.lists(st.lists(st.text(max_size=9), min_size=1, max_size=3), max_size=5).map(table),
    damage=DAMAGE,
    kept=KEPT,
    labelled=st.booleans(),
)
def test_tables(
    tmp_path: Path, suffix: str, content: bytes, damage: list[tuple[float, int]], kept: float, labelled: bool
) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(damaged(content, damage, kept))
    rows(path, labelled)


@few
@hypothesis.given(texts=st.lists(st.text(max_size=9), min_size=1, max_size=5), damage=DAMAGE, kept=KEPT)
def test_parquet(tmp_path: Path, texts: list[str], damage: list[tuple[float, int]], kept: float) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    file = io.BytesIO()
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    parquet.write_table(arrow.table({"text": texts, "label": list(range(len(texts)))}), file)
    path = tmp_path / "a.parquet"
    path.write_bytes(damaged(file.getvalue(), damage, kept))
    rows(path, True)


def rows(path: Path, labelled: bool) -> None:
    """Reads a table, or an error names it."""
    try:
        for row in read_rows(path, Columns(labelled=labelled)):
            assert isinstance(row.text, str)
    except UserError as error:
        check_message(error, path)


@few
@hypothesis.given(
    cu=st.lists(st.sampled_from([0, 1, 8, 40, 41, -1, 2**31 - 1, -(2**31)]) | st.integers(-50, 50), max_size=5)
)
@hypothesis.example(cu=[0, 1, -(2**31)])  # the difference wraps
def test_cu_seqlens(cu: list[int]) -> None:
    """Rows outside of valid segments do not reach the result, and nothing outside the tensors is written."""
    from fusebert.kernels import attention_varlen

    buffer = torch.randn(3, 40, 3, 1, 16)
    before = buffer.clone()
    try:
        out = attention_varlen(buffer[1], torch.tensor(cu, dtype=torch.int32), 64)
    except ValueError as error:
        good = "cu_seqlens" in str(error)
    else:
        good = out.shape == (40, 1, 16)
    assert good
    assert torch.equal(buffer, before)
