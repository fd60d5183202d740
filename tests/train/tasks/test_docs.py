"""Every command and every Python block of docs/tasks.md runs, in the order of the page."""

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from tf_checkpoints import variables_of, write_checkpoint

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "tasks.md").read_text(encoding="utf-8")
SECTIONS = [(part.partition("\n")[0], part) for part in re.split(r"^## ", PAGE, flags=re.M)[1:]]


def test_every_code_block_is_in_a_section() -> None:
    blocks = [kind for _, part in SECTIONS for kind in re.findall(r"^```(\w+)$", part, flags=re.M)]
    assert len(blocks) == PAGE.count("```") // 2
    assert set(blocks) == {"console", "python"}
    assert "fusebert" not in "".join(re.findall(r"^    .*$", PAGE, flags=re.M))  # no command outside of a block


@pytest.mark.parametrize(("title", "part"), SECTIONS, ids=[title for title, _ in SECTIONS])
def test_section(title: str, part: str, place: Path, fusebert: Callable[..., int], monkeypatch, tmp_path: Path) -> None:
    shutil.copytree(place / "model", tmp_path / "runs" / "first" / "hf")
    shutil.copytree(place / "corpus", tmp_path / "data" / "pydocs")
    texts = (place / "texts.txt").read_text().splitlines()
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    for table in (*place.glob("*train.*"), *place.glob("*dev.*")):
        shutil.copy(table, tmp_path)
    (tmp_path / "masked.txt").write_text("The [MASK] lives here.\n")
    (tmp_path / "article.txt").write_text(" ".join(texts))
    (tmp_path / "reviews.tsv").write_text("stars\treview\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(texts)))
    if "uncased_L-2/" in part:
        original = tmp_path / "uncased_L-2"
        model = transformers.BertForPreTraining.from_pretrained(place / "model")
        write_checkpoint(original / "bert_model.ckpt", variables_of(model), monkeypatch)
        shutil.copy(place / "model" / "config.json", original / "bert_config.json")
        shutil.copy(place / "model" / "vocab.txt", original)
    monkeypatch.chdir(tmp_path)
    for kind, code in re.findall(r"^```(\w+)\n(.*?)^```$", part, flags=re.M | re.S):
        if kind == "python":
            exec(compile(code, title, "exec"), {"__name__": "__main__"})
        else:
            for line in code.splitlines():
                name, *words = shlex.split(line)
                assert name == "fusebert"
                assert fusebert(*words) == 0, line
