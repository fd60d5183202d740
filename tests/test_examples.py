"""The programs in examples/ run as their docstrings say, at a small size."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, *options: str) -> str:
    done = subprocess.run([sys.executable, str(EXAMPLES / name), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_fuse_a_model():
    said = run("fuse_a_model.py", "--batch", "3", "--seqlen", "16")
    assert "attention" in said
    assert float(re.search(r"largest difference on real tokens: (\S+)", said)[1]) < 1e-5


def test_kernels_alone():
    said = run("kernels_alone.py")
    assert re.search(r"31 tokens in 3 segments on \w+: loss [67]\.\d+", said)  # log(1000) = 6.9


def test_pretrain_and_finetune(tmp_path):
    small = ("--steps", "2", "--max-bytes", "200KB", "--examples", "20", "--epochs", "1")
    said = run("pretrain_and_finetune.py", "--out", str(tmp_path), "--packages", "torch", "numpy", *small)
    assert "40 docstrings to train on, 300 to judge by: torch, numpy?" in said
    assert len(re.findall(r"accuracy from .*: \d+\.\d%", said)) == 2
