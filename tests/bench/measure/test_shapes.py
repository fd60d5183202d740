"""Shapes and peers as the user names them."""

import numpy as np
import pytest
import torch
from oracle import DEVICE
from typer.testing import CliRunner

from fusebert.bench.cli import app
from fusebert.bench.measure.case import OURS, PEER, matches
from fusebert.bench.measure.shapes import Key, parse
from fusebert.bench.operators import run as kernels
from fusebert.bench.operators.segments import segment_lengths
from fusebert.train.errors import UserError

HERE = torch.device(DEVICE)
KEYS = {"N": Key("length", 128), "p": Key("dropout", 0.5), "lengths": Key("lengths", "equal", ("equal", "half"))}


def cases(op=None, **options):
    return kernels.select_cases(op, HERE, torch.float32, **options)


def test_keys_left_out_have_their_defaults():
    assert parse("N=8; p=0.25,lengths=half ;", KEYS) == [
        {"N": 8, "p": 0.5, "lengths": "equal"},
        {"N": 128, "p": 0.25, "lengths": "half"},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "shapes are written"),
        ("N", "shapes are written"),
        ("N=", "shapes are written"),
        ("M=8", "there is no key 'M': choose among N, p, lengths"),
        ("N=8,N=9", "N is given twice"),
        ("N=0", "N=0: must be a positive integer"),
        ("N=8.5", "must be a positive integer"),
        ("p=1", "must be a number from 0 up to"),
        ("p=nan", "must be a number from 0 up to"),
        ("lengths=short", "choose one of equal, half"),
    ],
)
def test_what_is_not_a_shape(text, message):
    with pytest.raises(ValueError, match=r"must|choose|written|twice") as error:
        parse(text, KEYS)
    assert message in str(error.value)


@pytest.mark.parametrize("op", kernels.OPERATORS)
def test_every_operator_takes_shapes_and_has_built_in_ones(op):
    operator = kernels.OPERATORS[op]
    keys = operator.keys(HERE)
    first, second = list(keys)[:2]
    text = f"{first}=16,{second}=32; {first}=8,{second}=64"
    a, b = operator.cases(HERE, torch.float32, quick=True, shapes=text)
    assert a.name != b.name
    assert a.shape != b.shape
    assert [case.op for case in (a, b)] == [op, op]
    assert len(operator.cases(HERE, torch.float32, quick=True)) == 1


def test_built_in_names_are_unique():
    """On a GPU's list too: the shapes are parsed, nothing is put on it."""
    for op, operator in kernels.OPERATORS.items():
        names = [case.name for case in operator.cases(HERE, torch.float32)]
        assert len(set(names)) == len(names), op
        on_gpu = torch.device("cuda")
        shapes = [str(s) for _, text in operator.built_in(on_gpu) for s in parse(text, operator.keys(on_gpu))]
        assert len(set(shapes)) == len(shapes), op


def test_attention_on_a_gpu_goes_from_64_to_8192_with_pairs_for_dropout_and_padding():
    on_gpu = torch.device("cuda")
    operator = kernels.OPERATORS["attention"]
    shapes = [s for _, text in operator.built_in(on_gpu) for s in parse(text, operator.keys(on_gpu))]
    for head_dim in (64, 128):
        found = {s["N"] for s in shapes if s["D"] == head_dim and s["lengths"] == "equal" and s["p"] == 0}
        assert found == {64, 128, 256, 512, 1024, 2048, 4096, 8192}
    assert {s["T"] for s in shapes} == {65536}
    assert {s["D"] * s["H"] for s in shapes} == {768}
    for s in shapes:
        if s["p"]:
            assert {**s, "p": 0.0} in shapes  # the pair that says what dropout costs
    assert {"N": 512, "T": 65536, "H": 12, "D": 64, "lengths": "half", "p": 0.0} in shapes


def test_quick_and_dropout_ask_for_what_they_say():
    (case,) = cases("attention", shapes="N=32,T=100,H=2,D=16,lengths=half,p=0.25", quick=True)
    assert case.dropout_p == 0.25
    assert (case.shape["tokens"], case.shape["longest"], case.shape["heads"], case.shape["head_dim"]) == (
        100,
        32,
        2,
        16,
    )
    assert 0.3 < case.shape["padding"] < 0.6


@pytest.mark.parametrize("kind", ["equal", "real", "half"])
@pytest.mark.parametrize(("tokens", "longest"), [(65536, 512), (65536, 128), (1024, 512), (64, 64), (10, 1), (77, 13)])
def test_lengths_fill_the_tokens(kind, tokens, longest):
    lengths = segment_lengths(kind, tokens, longest)
    assert sum(lengths) == (tokens // longest * longest if kind == "equal" else tokens)
    assert max(lengths) == longest
    assert min(lengths) >= 1


def test_half_is_half_padding_and_real_is_what_the_table_says():
    assert np.mean(segment_lengths("half", 65536, 512)) == pytest.approx(256, rel=0.02)
    real = segment_lengths("real", 65536, 512)
    assert np.median(real) == pytest.approx(456, rel=0.02)
    assert np.quantile(real, 0.25) == pytest.approx(203, rel=0.03)
    assert segment_lengths("real", 65536, 512) == real


def test_a_segment_must_fit():
    with pytest.raises(ValueError, match="N=512 must be at most T=64"):
        segment_lengths("equal", 64, 512)


def test_names_match_by_whole_words():
    assert matches("sdpa flash", "SDPA")
    assert matches("sdpa flash", "sdpa flash")
    assert matches("torch, bias in the product", "torch")
    assert not matches("sdpa flash", "flash")
    assert not matches("torch.compile", "torch")
    assert not matches("sdpa", "sdpa flash")
    assert not matches("sdpa", " ")


def test_peers_leave_ours_and_bounds():
    (case,) = cases("mlm_loss", quick=True, peers=["torch eager"])
    names = [c.name for c in case.contestants]
    assert any(c.role == OURS for c in case.contestants)
    assert "its matrix products" in names
    assert {c.name for c in case.contestants if c.role == PEER} == {"torch eager", "torch eager, fp32 logits"}
    assert not case.missing


def test_a_peer_that_is_not_installed_stays_a_named_gap():
    (case,) = cases("attention", shapes="N=16,T=32", quick=True, peers=["flash-attn", "sdpa math"])
    names = {c.name for c in case.contestants if c.role == PEER} | {gap.name for gap in case.missing}
    assert names == {"flash-attn", "sdpa math"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--op", "attention", "--peers", "sdpa, tensorrt"], "there is no peer 'tensorrt' here: choose among sdpa"),
        (["--op", "layernorm", "--peers", "xformers"], "there is no peer 'xformers' here"),
        (["--shapes", "N=128"], "give --op with it"),
        (["--op", "attention", "--shapes", "M=128"], "there is no key 'M': choose among N, T, H, D, lengths, p"),
        (["--op", "attention", "--shapes", "N=128,T=64"], "N=128 must be at most T=64"),
        (["--op", "embed_layernorm", "--shapes", "V=4"], "V=4: must be above 4"),
    ],
)
def test_one_line_says_what_exists(args, message):
    done = CliRunner().invoke(app, ["kernels", "--device", DEVICE, *args])
    assert isinstance(done.exception, UserError)
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)


def test_help_teaches_every_key():
    text = CliRunner().invoke(app, ["kernels", "--help"]).output
    for op, operator in kernels.OPERATORS.items():
        start = text.index(f"{op} ", text.index("The keys:"))
        for key in operator.keys(HERE):
            assert f" {key} " in text[start : start + 260], f"{op}: {key}"


def test_a_run_of_ones_own_shapes(tmp_path):
    out = tmp_path / "own.json"
    args = ["--op", "bias_gelu", "--shapes", "T=64,I=32; T=65", "--peers", "torch eager", "--quick", "--out", out]
    done = CliRunner().invoke(app, ["kernels", "--device", DEVICE, *map(str, args)])
    assert done.exit_code == 0, done.output
    assert "T=64 I=32" in done.output
    assert "T=65 I=" in done.output
    assert "torch eager" in done.output
    assert "bias in the product" not in done.output
    assert "ceilings after the run" in done.output
