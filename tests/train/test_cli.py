"""The command line: help without PyTorch, one line for every mistake."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import SMALL
from small_corpus import make_corpus

from fusebert.model.config import BertConfig
from fusebert.model.hf import save_hf
from fusebert.model.pretraining import BertForPreTraining
from fusebert.train import cli
from fusebert.train.run.pretrain import pretrain
from fusebert.train.run.settings import PretrainSettings


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, an incomplete corpus, and a model with another vocabulary."""
    place = tmp_path_factory.mktemp("cli")
    make_corpus(place)
    shutil.copytree(place / "corpus", place / "rotten")
    tokens = place / "rotten" / "train-00000.tokens.npy"
    tokens.write_bytes(tokens.read_bytes()[:-2] + b"\x07\x00")  # another id of the vocabulary
    (place / "half").mkdir()
    (place / "half" / "train-00000.tokens.npy").write_bytes(b"\x93NUMPY")
    save_hf(BertForPreTraining(BertConfig.preset("tiny", 300)), place / "model", None)
    (place / "file").write_text("")
    return place


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fusebert", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


@pytest.mark.parametrize(
    "words", [["--help"], ["pretrain", "--help"], ["prepare", "--help"], ["embed", "--help"], ["bench", "--help"]]
)
def test_help_does_not_load_torch(words: list[str]) -> None:
    script = (
        f"import sys; sys.argv = ['fusebert', *{words!r}]\n"
        "from fusebert.train.cli import main\n"
        "try: main()\n"
        "except SystemExit as stopped: assert not stopped.code\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "Usage" in result.stdout


def test_without_a_command_there_is_help_and_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch) == 2
    captured = capsys.readouterr()
    assert "prepare" in captured.out
    assert captured.err == ""


def test_module_and_version() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "fusebert.train", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("fusebert 0.")


def test_ctrl_c_is_not_lost_while_modules_are_imported() -> None:
    """Python loses a KeyboardInterrupt that is raised in a weak reference's callback, as imports have them."""
    script = (
        "import os, signal, sys, weakref\n"
        "sys.argv = ['fusebert', 'pretrain', '--help']\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'fusebert.train.cli':\n"
        "            gone = type('Gone', (), {})()\n"
        "            self.kept = weakref.ref(gone, lambda ref: os.kill(os.getpid(), signal.SIGINT))\n"
        "            del gone\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from fusebert.train.__main__ import main\n"
        "main()\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGINT
    assert "Usage" not in result.stdout


@pytest.mark.parametrize(
    ("words", "status", "expected"),
    [
        (["--help"], 0, "pretrain"),
        (["bench", "--help"], 0, "pip install 'fusebert[bench]'"),
        (["bench", "step", "--model", "tiny"], 1, "could not be loaded: it needs a_plotting_library: pip install"),
    ],
)
def test_a_subcommand_that_cannot_be_imported_leaves_the_others(words: list[str], status: int, expected: str) -> None:
    script = (
        f"import importlib.metadata, sys; sys.argv = ['fusebert', *{words!r}]\n"
        "def load(self): raise ModuleNotFoundError(name='a_plotting_library')\n"
        "importlib.metadata.EntryPoint.load = load\n"
        "from fusebert.train.cli import main\n"
        "main()\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == status
    assert expected in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


MISTAKES = {
    "no such folder": (["--data", "{place}/nowhere"], "nowhere does not exist"),
    "half written": (["--data", "{place}/half"], "is not a finished corpus"),
    "damaged": (["--data", "{place}/rotten"], "rotten/train-00000.tokens.npy is damaged: its sha256 differs"),
    "a file": (["--data", "{place}/file"], "is a file, not a folder"),
    "unknown model": (["--model", "huge"], "choose one of auto, tiny, mini, small, base, large"),
    "unknown option": (["--colour", "red"], "--colour"),
    "not a number": (["--lr", "fast"], "'--lr': Input should be a valid number"),
    "both lengths": (["--minutes", "1"], "both were given"),
    "no step": (["--steps", "0"], "--steps must be positive"),
    "batch shorter than a segment": (["--tokens-per-batch", "64"], "must be at least --seqlen 128"),
    "odd batch": (["--tokens-per-batch", "1001"], "multiple of 8"),
    "uneven accumulation": (["--tokens-per-batch", "256", "--batch-tokens", "700"], "768 is the nearest"),
    "too long": (["--seqlen", "1024"], "more than the model's 512 positions"),
    "rate below zero": (["--lr", "-1"], "--lr must be positive"),
    "dropout of 1": (["--dropout", "1.0"], "--dropout must be in [0, 1)"),
    "masks nothing": (["--mlm-probability", "0"], "--mlm-probability must be between 0 and 1"),
    "precision": (["--precision", "fp12"], "choose one of auto, bf16, fp16, fp32, tf32, fp8"),
    "fp8 on a CPU": (["--precision", "fp8"], "compute capability 8.9 or more (H100, L40, RTX 40), not the cpu; give"),
    "tf32 on a CPU": (["--precision", "tf32"], "8.0 or more (A100, RTX 30), not this cpu; give --precision fp32"),
    "unknown optimizer": (["--optimizer", "sgd"], "choose one of adamw, lamb, muon"),
    "unknown schedule": (["--schedule", "step"], "choose one of linear, cosine, wsd, constant"),
    "another vocabulary": (["--init-from", "{place}/model"], "a vocabulary of 300 tokens"),
    "no model": (["--init-from", "{place}/nowhere"], "nowhere is not a folder"),
    "model twice": (["--init-from", "{place}/model", "--model", "tiny"], "contradict each other"),
    "batch of 10⁹": (["--tokens-per-batch", "1000000000"], "--tokens-per-batch must be at most 1048576"),
    "step of 10¹²": (["--batch-tokens", "1000000000000"], "--batch-tokens must be at most"),
    "segment of 10⁹": (["--seqlen", "1000000000"], "--seqlen must be at most"),
    "10⁹ threads": (["--threads", "1000000000"], "--threads must be at most 512; got 1000000000"),
    "10⁹ workers": (["--workers", "1000000000"], "--workers must be at most 256"),
    "seed of 2⁶⁴": (["--seed", str(1 << 64)], "--seed must be at most 18446744073709551615"),
    "steps of 400 digits": (["--steps", "9" * 400], "--steps must be at most"),
    "steps of 5,000 digits": (["--steps", "9" * 5000], "--steps"),
    "minutes of 400 digits": (["--minutes", "9" * 400], "--minutes"),
    "out is a file": (["--out", "{place}/file"], "file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words, expected = MISTAKES[name]
    # Later options on the command line replace earlier ones.
    given = ["--data", "{place}/corpus", "--out", str(tmp_path / "run"), "--device", "cpu", "--steps", "1", *words]
    assert call(monkeypatch, "pretrain", *(word.format(place=place) for word in given)) in (1, 2)
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("fusebert: error: ")
    assert expected in line
    assert not (tmp_path / "run").exists()


def test_a_damaged_corpus_is_trained_on_when_told(place: Path, tmp_path: Path) -> None:
    settings = PretrainSettings(place / "rotten", tmp_path / "run", **{**SMALL, "steps": 1, "verify": False})
    report = pretrain(settings, resume_command="")
    assert report is not None
    assert report.steps == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", place / "corpus", "--out", place / "run", "--device", "cuda", "--steps", "1"]
    assert call(monkeypatch, "pretrain", *words) == 2
    assert "PyTorch finds no CUDA GPU here" in capsys.readouterr().err


def test_no_length(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "pretrain", "--data", place / "corpus", "--out", place / "run") == 2
    assert "--steps 100000 or --minutes 5" in capsys.readouterr().err
