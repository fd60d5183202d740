"""Every command of docs/your-own-text.md runs, in the order of the page, on small files and with few steps."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from small_corpus import write_text

from fusebert.model import BertConfig, BertForPreTraining
from fusebert.model.hf.save import save_hf
from fusebert.train import cli

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "your-own-text.md").read_text(encoding="utf-8")
COMMANDS = [
    line for code in re.findall(r"^```console\n(.*?)^```$", PAGE, flags=re.M | re.S) for line in code.splitlines()
]
SMALL = {
    "prepare": ["--vocab-size=240", "--workers=1", "--heldout=0.1"],
    "pretrain": ["--model=tiny", "--steps=2", "--threads=1", "--device=cpu", "--no-tensorboard", "--log-every=1"],
}


def run(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> int:
    monkeypatch.setattr(sys, "argv", ["fusebert", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def small(words: list[str]) -> list[str]:
    """The same command on the small files: later options replace earlier ones."""
    options = SMALL.get(words[0], [])
    if "--init-from" in words:
        options = [option for option in options if not option.startswith("--model")]
    if "--tokenizer" in words:
        options = [option for option in options if not option.startswith("--vocab-size")]
    if "--vocab-type" in words:
        options = ["--vocab-size=600" if option.startswith("--vocab-size") else option for option in options]
    return [*words, *options]


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wiki").mkdir()
    texts = write_text(tmp_path / "wiki" / "a.txt", documents=200).read_text().split("\n\n")
    for number in range(1, 9):
        write_text(tmp_path / "wiki" / f"{number}.txt", documents=20, seed=number)
    (tmp_path / "notes.txt").write_text("\n".join(texts))
    records = [json.dumps({"article": {"body": text}}) for text in texts]
    (tmp_path / "news.jsonl").write_text("\n".join([*records, "{", '{"article": 3}']))
    monkeypatch.chdir(tmp_path)
    for line in COMMANDS:
        name, *words = shlex.split(line)
        assert name == "fusebert"
        if "--tokenizer" in words:  # the model that the reader has
            config = BertConfig.preset("tiny", vocab_size=240)
            save_hf(BertForPreTraining(config), Path("model"), Path("data/mine/tokenizer.json"))
        assert run(monkeypatch, small(words)) == 0, line
    assert len(COMMANDS) == PAGE.count("\nfusebert ")
