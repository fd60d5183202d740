"""What is wrong is called wrong, whatever is wrong with it, and is not timed."""

import dataclasses
import functools

import pytest
import torch
from oracle import DEVICE, relative_error

from fusebert.bench.measure.case import OURS, Case, Contestant, Run
from fusebert.bench.measure.ceilings import Ceilings
from fusebert.bench.measure.correctness import COARSE, FAILED, RIGHT, UNCHECKED, WRONG
from fusebert.bench.measure.machine import environment
from fusebert.bench.measure.result import KernelsResult
from fusebert.bench.measure.settings import KernelsSettings
from fusebert.bench.measure.verify import Judge, verify
from fusebert.bench.operators import attention
from fusebert.bench.operators import run as kernels

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
HERE = torch.device(DEVICE)
CEILINGS = Ceilings(copy_bytes_per_s=1e10, matmul_flops_per_s=1e11, dtype="")


RAGGED = {"N": 32, "T": 75, "H": 2, "D": 16, "lengths": "half", "p": 0.0}


def select_case(op: str, shape: str, dtype=DTYPE) -> Case:
    (case,) = kernels.select_cases(op, HERE, dtype, quick=True, shapes=shape)
    return case


CASES = {
    "attention": select_case("attention", "N=32,T=75,H=2,D=16,lengths=half"),
    "attention equal": select_case("attention", "N=16,T=48,H=2,D=16"),
    "attention dropout": select_case("attention", "N=32,T=128,H=2,D=16,p=0.3"),
    "layernorm dropout": select_case("layernorm", "T=64,H=48,p=0.3"),
    "mlm_loss": select_case("mlm_loss", "M=40,H=32,V=100"),
    "bias_gelu": select_case("bias_gelu", "T=40,I=48"),
    "gelu_linear": select_case("gelu_linear", "T=40,H=32,I=48"),
    "linear_gelu": select_case("linear_gelu", "T=40,H=32,I=48"),
    "embed_layernorm dropout": select_case("embed_layernorm", "T=200,H=48,V=60,p=0.3"),
}


def judges(case: Case):
    inputs = case.inputs(1)
    return {p: Judge(case, inputs, p) for p in {0.0, case.dropout_p}}


def changed(contestant: Contestant, change) -> Contestant:
    """``contestant`` with ``change(name, tensor)`` applied to each result."""

    def bind(inputs, dropout_p):
        run = contestant.bind(inputs, dropout_p)

        def named(out, gradients):
            return {name: change(name, x) for name, x in run.named(out, gradients).items()}

        return dataclasses.replace(run, named=named)

    return dataclasses.replace(contestant, bind=bind)


@pytest.mark.parametrize("name", CASES)
def test_every_contestant_is_right_or_says_why_not(name):
    case = CASES[name]
    verdicts = {c.name: verify(case, c, judges(case)) for c in case.contestants}
    for contestant in case.contestants:
        verdict = verdicts[contestant.name]
        if contestant.role == OURS:
            assert verdict.status == RIGHT, f"{contestant.name}: {verdict}"
        elif contestant.name == "its matrix products":
            assert verdict.status == UNCHECKED
        else:
            too_old = DEVICE == "cuda" and verdict.detail  # a backend may not know a GPU, and says so
            assert verdict.status in (RIGHT, COARSE) or too_old, f"{contestant.name}: {verdict}"
    timed = [n for n, verdict in verdicts.items() if verdict.may_be_timed]
    assert "torch eager" in timed


@pytest.mark.parametrize("broken", ["out", "dx", "dresidual", "dweight", "dbias"])
def test_one_wrong_gradient_is_enough(broken):
    case = CASES["layernorm dropout"]
    good = case.contestants[0]
    bad = changed(good, lambda name, x: x * 1.5 if name == broken else x)
    verdict = verify(case, bad, judges(case))
    assert verdict.status == WRONG
    assert not verdict.may_be_timed
    assert broken in verdict.detail


def test_a_single_element_that_was_not_written_is_wrong():
    def spoil(name, x):
        x = x.contiguous().clone()
        x.view(-1)[-1] = float("nan")
        return x

    case = CASES["attention"]
    verdict = verify(case, changed(case.contestants[0], spoil), judges(case))
    assert verdict.status == WRONG
    assert "not finite" in verdict.detail


def test_a_wrong_shape_is_wrong_and_a_missing_result_too():
    case = CASES["mlm_loss"]
    contestant = case.contestants[0]
    assert "shape" in verify(case, changed(contestant, lambda _, x: x[None]), judges(case)).detail

    def bind(inputs, dropout_p):
        return dataclasses.replace(contestant.bind(inputs, dropout_p), named=lambda out, _: {"loss": out})

    assert verify(case, dataclasses.replace(contestant, bind=bind), judges(case)).status == WRONG


def test_error_between_twice_and_eight_times_torchs_is_coarse():
    case = CASES["layernorm dropout"]
    found = judges(case)
    allowance = found[case.dropout_p].allowance["out"]
    generator = torch.Generator(DEVICE).manual_seed(0)

    def blur(factor):
        def change(name, x):
            if name != "out":
                return x
            right = found[case.dropout_p].oracle["out"]
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float64, device=DEVICE)
            return right + factor * allowance * noise * (right.norm() / noise.norm())

        return verify(case, changed(case.contestants[0], change), found)

    assert blur(4.0).status == COARSE
    assert blur(4.0).may_be_timed
    assert blur(12.0).status == WRONG


def test_ours_with_another_mask_than_the_replayed_one_is_wrong():
    case = CASES["attention dropout"]
    ours = case.contestants[0]
    other_seed = dataclasses.replace(ours, bind=lambda inputs, p: ours.bind({**inputs, "seed": inputs["seed"] + 1}, p))
    assert verify(case, ours, judges(case)).status == RIGHT
    assert verify(case, other_seed, judges(case)).status == WRONG


def test_a_peer_that_forgets_to_drop_is_wrong():
    case = CASES["layernorm dropout"]
    eager = next(c for c in case.contestants if c.name == "torch eager")
    lazy = dataclasses.replace(eager, bind=lambda inputs, p: eager.bind(inputs, 0.0))
    assert verify(case, eager, judges(case)).status == RIGHT
    assert "nothing was dropped" in verify(case, lazy, judges(case)).detail


def test_attending_to_padding_is_wrong():
    """The mistake that a padded peer would make on ragged lengths."""
    segments = attention.OPERATOR.setting(RAGGED, HERE, DTYPE, quick=True)
    case = attention.OPERATOR.case(segments)

    def without_mask(segments):
        return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v)

    unmasked = Contestant("unmasked", functools.partial(attention.padded, segments, without_mask))
    assert verify(case, unmasked, judges(case)).status == WRONG


@pytest.mark.parametrize(
    ("layout", "flex"), [(attention.padded, attention.flex_padded), (attention.separate, attention.flex_packed)]
)
def test_flex_attention_is_given_the_right_block_mask(layout, flex, monkeypatch):
    """Its forward alone, uncompiled: what of it runs on a CPU too."""
    segments = attention.OPERATOR.setting(RAGGED, HERE, torch.float32, quick=True)
    case = attention.OPERATOR.case(segments)
    inputs = case.inputs(1)
    right = case.oracle(inputs, 0.0)["out"]
    monkeypatch.setattr(attention, "leaf", torch.Tensor.detach)
    monkeypatch.setattr(attention, "compiled", lambda function: function)
    run = layout(segments, flex, inputs, 0.0)
    out = run.forward()
    assert relative_error(run.named(out, (out,) * 3)["out"], right) < 1e-5


def test_the_embedding_tables_gradients_are_held_to_float32():
    """In bf16 too: a gradient rounded to bf16 is not right."""
    case = select_case("embed_layernorm", "T=64,H=32,V=40,p=0", torch.bfloat16)
    found = judges(case)
    assert verify(case, case.contestants[0], found).status == RIGHT
    rounded = changed(case.contestants[0], lambda name, x: x.bfloat16() if name == "dposition_weight" else x)
    assert verify(case, rounded, found).status == WRONG


def test_a_contestant_that_raises_is_out_of_the_race_and_the_race_goes_on():
    case = CASES["mlm_loss"]

    def bind(inputs, dropout_p):
        raise RuntimeError("this GPU is too old\nand more")

    broken = Contestant("broken", bind)
    wrong = changed(case.contestants[2], lambda name, x: -x)
    verdict = verify(case, broken, judges(case))
    assert verdict.status == FAILED
    assert verdict.detail == "RuntimeError: this GPU is too old"

    entered = dataclasses.replace(
        case, contestants=(case.contestants[0], broken, dataclasses.replace(wrong, name="wrong"))
    )
    for measured in kernels.run_case(entered, CEILINGS, effort=kernels.QUICK):
        rows = {row.name: row for row in measured.contestants}
        assert rows["fusebert"].time is not None
        assert rows["broken"].time is rows["wrong"].time is None
        assert rows["wrong"].verdict.status == WRONG


def test_our_own_mistake_fails_the_run():
    case = CASES["mlm_loss"]
    bad = dataclasses.replace(case, contestants=(changed(case.contestants[0], lambda name, x: 2 * x),))
    result = KernelsResult(environment(HERE), KernelsSettings(), CEILINGS)
    result.results += kernels.run_case(bad, CEILINGS, effort=kernels.QUICK)
    (problem,) = result.problems
    assert "fusebert is wrong" in problem


def test_gradients_are_new_each_time():
    """Accumulation would be timed, and would be wrong the second time."""
    case = CASES["layernorm dropout"]
    run: Run = case.contestants[0].bind(case.inputs(0), 0.0)
    first, second = run.forward_backward(), run.forward_backward()
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert all(x.grad is None for x in run.leaves)
