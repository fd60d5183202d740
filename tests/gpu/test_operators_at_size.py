"""Every operator at the sizes of a real run: right, the same bits twice, every element written, compiled, in a graph.

Shapes of the benchmark and a few odd ones. On a GPU they have 64 k tokens, mostly in bf16; without one the same bodies
run small, in Triton's interpreter and float32 or in every dtype by `make gpu-check`, so that a mistake here is found
before there is a GPU to find it on.
"""

import contextlib
import gc

import pytest
import torch
from gpu_check import ON_CPU
from oracle import DEVICE

from fusebert.bench.measure.case import OURS
from fusebert.bench.measure.correctness import RIGHT
from fusebert.bench.measure.verify import Judge, verify
from fusebert.bench.operators.run import OPERATORS
from fusebert.kernels import use_backend

ON_GPU = DEVICE == "cuda"
HERE = torch.device(DEVICE)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
SHAPES = {
    True: {
        "attention": "N=1; N=2; N=16; N=33; N=64; N=100; N=128; N=256; N=512; N=1000; N=2048; N=8192;"
        "N=128,lengths=real; N=512,lengths=real; N=512,lengths=half; N=2048,lengths=real; N=128,p=0.1; N=512,p=0.1;"
        "N=512,lengths=real,p=0.1; N=128,D=128,H=6; N=512,D=128,H=6,lengths=half; N=128,D=32; N=300,D=256,H=2",
        "layernorm": "H=768; H=768,p=0; H=1024; H=1024,p=0; H=4096,T=16384; H=1000,T=7777; H=768,T=1",
        "mlm_loss": "V=30522; H=1024; M=1; M=777,V=1003",
        "bias_gelu": "I=3072; I=4096; I=1000,T=7777; T=1",
        "linear_gelu": "H=768; H=1024,I=4096; H=768,gelu=tanh; T=7777,H=1000,I=1003; T=1",
        "gelu_linear": "H=768; H=1024,I=4096; H=768,gelu=tanh; T=7777,H=1000,I=1003; T=1",
        "embed_layernorm": "H=768; H=768,p=0; H=1024; T=1; T=7777,H=1000",
    },
    False: {
        "attention": "N=1,T=3,H=1,D=16; N=33,T=40,H=2,D=16,lengths=real; N=16,T=32,H=1,D=16,p=0.2",
        "layernorm": "T=5,H=48,p=0.2; T=1,H=40,p=0",
        "mlm_loss": "M=20,H=16,V=50",
        "bias_gelu": "T=5,I=40",
        "linear_gelu": "T=5,H=24,I=40",
        "gelu_linear": "T=5,H=24,I=40",
        "embed_layernorm": "T=37,H=16,V=40,p=0.2",
    },
}[ON_GPU and not ON_CPU]
CASES = [(op, shape.strip()) for op, text in SHAPES.items() for shape in text.split(";")]
# The other dtypes on every third of them, or on all that are small.
OTHERS = (
    [(*case, dtype) for case in CASES[:: 1 if ON_CPU else 3] for dtype in (torch.float16, torch.float32)]
    if ON_GPU
    else []
)
pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic.*:UserWarning")


@pytest.fixture(autouse=True)
def kernels_not_fallbacks():
    with use_backend("triton"):
        yield
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


@contextlib.contextmanager
def poisoned():
    """Memory that an operator allocates and does not write is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def make(op, shape, dtype):
    (case,) = OPERATORS[op].cases(HERE, dtype, quick=True, shapes=shape)
    # Under ttsem these experiments' stores through tensor descriptors do not arrive; the cause is not known.
    unseen = ON_CPU and dtype != torch.float32
    return case, [c for c in case.contestants if c.role == OURS and not (unseen and "epilogue" in c.name)]


def results(run):
    out = run.forward()
    return run.named(out, run.backward(out))


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


def assert_same(case, inputs, found, expected):
    """To the bit, but where PyTorch's own products take part: in a graph they may be other algorithms of cuBLAS's."""
    if case.op in ("linear_gelu", "gelu_linear"):
        verdict = Judge(case, inputs, case.dropout_p).judge(found)
        assert verdict.status == RIGHT, verdict
    else:
        assert_same_bits(found, expected)


def test_the_poison_poisons():
    with poisoned():
        assert torch.empty(1000, device=DEVICE).isnan().all()
        assert torch.empty(1000, device=DEVICE, dtype=torch.bfloat16).isnan().all()


@pytest.mark.parametrize(("op", "shape", "dtype"), [(*case, DTYPE) for case in CASES] + OTHERS, ids=str)
def test_right_with_every_element_written(op, shape, dtype):
    case, ours = make(op, shape, dtype)
    judges = {case.dropout_p: Judge(case, case.inputs(5), case.dropout_p)}
    with poisoned():
        for contestant in ours:
            verdict = verify(case, contestant, judges)
            assert verdict.status == RIGHT, f"{contestant.name}: {verdict}"


@pytest.mark.parametrize(("op", "shape"), CASES)
def test_twice_the_same_bits(op, shape):
    case, ours = make(op, shape, DTYPE)
    inputs = case.inputs(6)
    for contestant in ours:
        assert_same_bits(*(results(contestant.bind(inputs, case.dropout_p)) for _ in range(2)))


@pytest.mark.parametrize("op", OPERATORS)
def test_compiled_whole_gives_the_same_bits(op):
    """By Inductor on a GPU; the interpreter's calls are only traced."""
    shape = SHAPES[op].split(";")[0 if op != "attention" else -1]
    case, ours = make(op, shape, DTYPE)
    inputs = case.inputs(7)
    for contestant in ours:
        if "epilogue" in contestant.name:  # an experiment of the benchmark, not an operator: Dynamo cannot trace it
            continue
        run = contestant.bind(inputs, case.dropout_p)
        expected = results(run)
        torch.compiler.reset()
        compiled = torch.compile(run.forward, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
        out = compiled()
        assert_same(case, inputs, run.named(out, run.backward(out)), expected)


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize(("op", "shape"), [case for case in CASES if "T=1" not in case[1]])
def test_captured_and_replayed_with_a_new_mask_each_time(op, shape):
    case, ours = make(op, shape, DTYPE)
    for contestant in ours:
        inputs = case.inputs(8)
        run = contestant.bind(inputs, case.dropout_p)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run.forward_backward()  # compiles the kernels: nothing may be compiled while capturing
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run.forward()
            gradients = run.backward(out)
        replayed = []
        for seed in (1, 2, 1):
            if "seed" in inputs:
                inputs["seed"].fill_(seed)
            graph.replay()
            found = {name: x.clone() for name, x in run.named(out, gradients).items()}
            assert_same(case, inputs, found, results(run))  # an ordinary call with that seed
            replayed.append(found)
        assert_same_bits(replayed[0], replayed[2])
        first = next(iter(replayed[0]))
        assert torch.equal(replayed[0][first], replayed[1][first]) == (case.dropout_p == 0)
