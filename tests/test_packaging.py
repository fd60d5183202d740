"""What must be installed for what: the kernels and `fuse` with PyTorch and Triton alone, the command with [train]."""

import json
import os
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from unittest import mock

from packaging.requirements import Requirement

SETUP = Path(__file__).resolve().parent.parent / "setup.py"

# Before anything else is imported: what does not come with PyTorch and Triton is not there.
BLOCKER = """
import importlib.abc, json, sys
class Blocker(importlib.abc.MetaPathFinder):
    blocked = set(json.loads(sys.argv.pop(1)))
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def _with_dependencies(*names: str) -> set[str]:
    """The installed distributions that ``pip install`` of these brings."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # another platform's
            continue
        found.add(name)
        requirements = [Requirement(line) for line in required]
        todo += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def _run_with_torch_and_triton_alone(script: str) -> "subprocess.CompletedProcess[str]":
    there = {"fusebert"} | _with_dependencies("torch", "triton")
    blocked = [
        module
        for module, owners in metadata.packages_distributions().items()
        if not there & {owner.lower().replace("_", "-") for owner in owners}
    ]
    assert {"safetensors", "tokenizers", "typer", "numpy"} <= set(blocked)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", BLOCKER + script, json.dumps(blocked)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def _settings() -> dict[str, object]:
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(SETUP))
    return setup.call_args.kwargs


def test_installed_alone_it_brings_torch_and_triton():
    assert {Requirement(line).name for line in _settings()["install_requires"]} == {"torch", "triton"}


def test_every_package_that_training_imports_is_in_train():
    names = {Requirement(line).name for line in _settings()["extras_require"]["train"]}
    libraries = {"numpy", "safetensors", "tokenizers", "typer", "rich", "tqdm", "zstandard", "blingfire", "regex"}
    assert libraries == names


def test_the_kernels_and_fuse_run_with_torch_and_triton_alone():
    script = """
import warnings
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
import torch
from fusebert.kernels import FusedLayerNorm, attention, attention_varlen, dropout_add_layernorm, masked_lm_loss
from fusebert.model import BertConfig, BertForPreTraining, fuse, register_attention, save_hf, unfuse

device = "cuda" if torch.cuda.is_available() else "cpu"
q, k, v = torch.randn(3, 2, 2, 8, 16, device=device, requires_grad=True)
x = attention(q, k, v, dropout_p=0.1).flatten(0, 2)
x = dropout_add_layernorm(x, x, torch.ones(16, device=device), torch.zeros(16, device=device))
loss = masked_lm_loss(FusedLayerNorm(16, device=device)(x), torch.randn(31, 16, device=device), None,
                      torch.arange(x.shape[0], device=device) % 31)
loss.backward()
encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1).to(device)
print(len(fuse(encoder).replaced), encoder(torch.randn(2, 5, 16, device=device)).shape[0])
for call in (register_attention, lambda: save_hf(BertForPreTraining(BertConfig.preset("tiny", 300)), "never")):
    try:
        call()
    except ImportError as error:
        print(error)
"""
    run = _run_with_torch_and_triton_alone(script)
    assert run.returncode == 0, run.stderr
    fused, *errors = run.stdout.splitlines()
    assert fused == "5 2"
    assert errors == [
        "register_attention needs transformers 4.56 or newer: pip install 'transformers>=4.56'",
        "model.safetensors needs the package safetensors: pip install safetensors",
    ]


def test_the_command_without_its_packages_says_what_to_install():
    run = _run_with_torch_and_triton_alone("import runpy; runpy.run_module('fusebert.train', run_name='__main__')")
    assert run.returncode == 1
    assert run.stderr == "fusebert: error: the command line needs typer: pip install 'fusebert[train]'\n"
