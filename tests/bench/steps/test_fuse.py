"""fusebert bench fuse: a fused encoder beside the unfused one."""

import json

import pytest
import torch
from oracle import DEVICE
from typer.testing import CliRunner

from fusebert.bench.cli import app
from fusebert.bench.measure.result import FuseResult, read_result
from fusebert.bench.report.figures import rewrite
from fusebert.bench.steps import fuse as bench

pytest.importorskip("transformers", minversion="5")

QUICK = ["--quick", "--model", "tiny", "--seqlens", "8,32", "--batches", "1,4", "--tokens", "64", "--device", DEVICE]


def invoke(*args):
    return CliRunner().invoke(app, [*map(str, args)])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("fuse") / "2026-01-01-fuse.json"
    return invoke("fuse", *QUICK, "--dtype", "fp32", "--out", out), out


def test_every_case_both_passes(measured):
    done, out = measured
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert (result["kind"], result["architecture"]) == ("fuse", "BertModel, 2 layers of 128")
    assert result["left_out"] == ["B=4 N=32, larger than --tokens 64"]
    found = [(case["batch"], case["seqlen"], case["pass"]) for case in result["cases"]]
    shapes = [(1, 8), (1, 32), (4, 8), (4, 8), (4, 8)]  # a batch of one is full; the others are filled three ways
    assert found == [(*shape, name) for shape in shapes for name in ("forward", "forward+backward")]
    assert sorted({case["filled"] for case in result["cases"]}) == [pytest.approx(f, abs=0.07) for f in (0.5, 0.8, 1.0)]
    for case in result["cases"]:
        ours, theirs = case["contestants"]
        assert (ours["name"], ours["role"], ours["verdict"]["status"]) == ("fusebert", "ours", "right")
        assert set(ours["verdict"]["errors"]) == {"out", "gradient"}
        assert (theirs["name"], theirs["role"]) == ("unfused", "peer")
        tokens = round(case["filled"] * case["batch"] * case["seqlen"])
        assert ours["tokens_per_s"] == pytest.approx(1e3 * tokens / ours["timing"]["median_ms"], rel=1e-3)
        products = case.get("products")
        assert (products is None) == (case["filled"] == 1.0)
        assert products is None or 0 < products["low"] <= products["median"] <= products["high"]
        assert theirs["ratio_to_ours"]["low"] <= theirs["ratio_to_ours"]["median"] <= theirs["ratio_to_ours"]["high"]


def test_the_report_and_the_documents_have_a_row_a_case(measured, tmp_path):
    out = measured[1]
    assert invoke("report", out, "--out", tmp_path).exit_code == 0
    text = (tmp_path / "report.md").read_text()
    assert text.count("| B=4 N=8, ") == 6
    document = tmp_path / "page.md"
    marked = f"<!-- figures fuse {out.name} -->\n<!-- end of figures -->\n"
    assert rewrite(marked, document, out.parent).count("| B=4 N=8, ") == 6
    assert len(read_result(out, FuseResult).cases) == 10


def test_a_fused_model_that_computes_something_else_is_not_timed(monkeypatch):
    def broken(model, **options):
        report = fuse(model, **options)
        with torch.no_grad():
            model.encoder.layer[1].output.dense.weight[0, 0] += 0.5
        return report

    fuse = bench.fuse
    monkeypatch.setattr(bench, "fuse", broken)
    done = invoke("fuse", *QUICK, "--dtype", "fp32", "--batches", "1", "--seqlens", "8")
    assert done.exit_code == 1, done.output
    assert "fusebert is wrong (" in done.output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--seqlens", "16,many"], "--seqlens must be numbers from 1 to"),
        (["--filled", "0.3"], "--filled must be numbers from 0.5 to 1, separated by commas; got '0.3'"),
        (["--model", "huge"], "choose one of tiny, mini, small, base, large; or give a folder"),
    ],
)
def test_mistakes(words, expected):
    done = invoke("fuse", *QUICK, *words)
    assert done.exit_code != 0
    assert expected in str(done.exception)
