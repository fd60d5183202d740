"""Text to a pretrained BERT to a classifier: which of two packages is a docstring from?

    python examples/pretrain_and_finetune.py --out runs/example --minutes 2

1. `fusebert prepare` and `fusebert pretrain` on the docstrings of the installed packages.
2. Hugging Face's BertForSequenceClassification loads the result; `fuse` puts the kernels into it; a plain PyTorch loop
   fine-tunes it. The same model with random weights shows what pretraining is worth.
"""

import argparse
import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from fusebert.model import fuse

MIN_CHARS = 80


def docstrings(package: str, limit: int) -> list[str]:
    """Up to ``limit`` docstrings of an installed package, in the order of its files. Nothing is imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"--packages: {package!r} is not an installed package")
    found: list[str] = []
    for path in sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")):
        try:
            nodes = ast.walk(ast.parse(path.read_bytes()))
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
            texts = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
        except (SyntaxError, ValueError):
            continue
        found += [text for text in texts if text and len(text) >= MIN_CHARS and package not in text.lower()]
        if len(found) >= limit:
            break
    return list(dict.fromkeys(found))[:limit]


def finetune(model, tokenizer, train, dev, epochs: int, device: str) -> float:
    """Accuracy on ``dev``, a list of (text, label), after training on ``train``."""
    model.to(device)
    fuse(model, unpad=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)

    def collate(rows):
        texts, labels = zip(*rows, strict=True)
        batch = tokenizer(list(texts), truncation=True, max_length=128, padding=True, return_tensors="pt").to(device)
        return batch, torch.tensor(labels, device=device)

    order = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        model.train()
        for batch, labels in DataLoader(train, batch_size=16, shuffle=True, generator=order, collate_fn=collate):
            model(**batch, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    right = 0
    with torch.no_grad():
        for batch, labels in DataLoader(dev, batch_size=64, collate_fn=collate):
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return right / len(dev)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/example"), help="folder for the corpus and the run")
    parser.add_argument("--minutes", type=float, help="minutes of pretraining (default: 2)")
    parser.add_argument("--steps", type=int, help="steps of pretraining, in place of --minutes")
    parser.add_argument("--packages", nargs=2, default=["torch", "transformers"], help="the two classes")
    parser.add_argument("--examples", type=int, default=400, help="docstrings of each package (default: 400)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training texts (default: 3)")
    parser.add_argument("--max-bytes", default="16MB", help="text to pretrain on (default: 16MB)")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    length = ["--steps", str(options.steps)] if options.steps else ["--minutes", str(options.minutes or 2)]

    fusebert = [sys.executable, "-m", "fusebert.train"]
    corpus, run = options.out / "corpus", options.out / "run"
    prepare = ["prepare", "--corpus", "pydocs", "--vocab-size", "4096", "--max-bytes", options.max_bytes]
    subprocess.run([*fusebert, *prepare, "--out", str(corpus), "--overwrite"], check=True)
    subprocess.run([*fusebert, "pretrain", "--data", str(corpus), "--out", str(run), *length], check=True)

    rows = [(text, label) for label, name in enumerate(options.packages) for text in docstrings(name, options.examples)]
    train, dev = [row for i, row in enumerate(rows) if i % 4], rows[::4]

    tokenizer = AutoTokenizer.from_pretrained(run / "hf")
    torch.manual_seed(0)
    pretrained = BertForSequenceClassification.from_pretrained(run / "hf", num_labels=2)
    random = BertForSequenceClassification(BertConfig.from_pretrained(run / "hf", num_labels=2))
    print(f"\n{len(train)} docstrings to train on, {len(dev)} to judge by: {' or '.join(options.packages)}?")
    for name, model in (("random weights", random), ("pretrained", pretrained)):
        print(f"accuracy from {name}: {finetune(model, tokenizer, train, dev, options.epochs, device):.1%}")


if __name__ == "__main__":
    main()
