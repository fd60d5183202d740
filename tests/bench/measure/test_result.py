"""Result files: what is written is read back, and files of earlier versions stay readable."""

import dataclasses
import json
import math
from dataclasses import field
from pathlib import Path

import pytest

from fusebert.bench.measure.result import ALL_KINDS, StepResult, read_result, result_json, write_result
from fusebert.bench.measure.serialise import FLAT, OPTIONAL, REST, from_json, to_json

FILES = sorted((Path(__file__).parents[3] / "bench" / "results").glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_committed_files_are_read_and_written_unchanged(path, tmp_path):
    result = read_result(path, *ALL_KINDS)
    assert result_json(result) == json.loads(path.read_text())
    write_result(tmp_path / path.name, result)
    assert json.loads((tmp_path / path.name).read_text()) == json.loads(path.read_text())
    if "aot" in path.name:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    result = read_result(next(path for path in FILES if "-step-" in path.name), StepResult)
    path = tmp_path / "new" / "x.json"
    write_result(path, result)
    before = path.read_bytes()
    result.left_out = [object()]
    with pytest.raises(TypeError):
        write_result(path, result)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["x.json"]


@dataclasses.dataclass
class Inner:
    a: float
    b: tuple[int, ...] = ()


@dataclasses.dataclass
class Outer:
    x: float
    inner: Inner | None = field(default=None, metadata=FLAT)
    several: dict[str, Inner] = field(default_factory=dict, metadata={"key": "the several"})
    maybe: int | None = field(default=None, metadata=OPTIONAL)
    others: dict[str, object] = field(default_factory=dict, metadata=REST)


@pytest.mark.parametrize(
    "data",
    [
        {"x": 1.0, "the several": {}},
        {"x": 1.0, "a": 2.5, "b": [1, 2], "the several": {"one": {"a": 1.0, "b": []}}, "maybe": 3, "unknown": [None]},
    ],
)
def test_dataclasses_are_json(data):
    assert to_json(from_json(Outer, data)) == data


def test_what_is_not_finite_is_null_and_null_is_nan():
    assert to_json([math.nan, {"x": math.inf}]) == [None, {"x": None}]
    assert math.isnan(from_json(Outer, {"x": None}).x)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "x is missing"),
        ({"x": "1"}, "x is not a number: '1'"),
        ({"x": True}, "x is not a number"),
        ({"x": 1, "a": 1, "b": [0, 1.5]}, r"b\[1\] is not of type int: '1.5'"),
        ({"x": 1, "the several": {"one": {}}}, "the several.one.a is missing"),
        ([], "it is not an object"),
    ],
)
def test_errors_name_the_field(data, message):
    with pytest.raises(ValueError, match=message):
        from_json(Outer, data)
