"""Text to a pretrained BERT to a classifier: which package is a docstring from?

    python examples/pretrain_and_finetune.py --out runs/example --minutes 5
    python examples/pretrain_and_finetune.py --out runs/minilm --model all-MiniLM-L6-v2/

1. `fusebert prepare` and `fusebert pretrain` on the docstrings of the installed packages (not with --model).
2. `fusebert finetune` on some packages' docstrings, without their package's name, and `fusebert predict` on others.
3. The same for a baseline: word frequencies (tf-idf) and logistic regression.
"""

import argparse
import ast
import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

MIN_CHARS, MAX_CHARS = 80, 600
HELD = 100  # texts of each package to choose the best model by, and as many to judge it by


def docstrings(package: str, count: int) -> list[str]:
    """``count`` docstrings of an installed package that do not name it, file by file in random order."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"--packages: {package!r} is not an installed package")
    found: dict[str, None] = {}
    paths = sorted(Path(spec.submodule_search_locations[0]).rglob("*.py"))
    random.Random(0).shuffle(paths)
    for path in paths:
        try:
            nodes = list(ast.walk(ast.parse(path.read_bytes())))
        except (SyntaxError, ValueError):
            continue
        for node in nodes:
            text = ast.get_docstring(node) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) else None
            if text and len(text) >= MIN_CHARS and package not in text.lower():
                found[" ".join(text.split())[:MAX_CHARS]] = None
        if len(found) >= count:
            break
    return list(found)[:count]


def write_tables(out: Path, packages: list[str], examples: int) -> dict[str, list[dict[str, str]]]:
    """train.jsonl, dev.jsonl and test.jsonl in ``out``, with ``examples`` texts of each package to train on."""
    tables: dict[str, list[dict[str, str]]] = {"train": [], "dev": [], "test": []}
    for package in packages:
        texts = docstrings(package, examples + 2 * HELD)
        parts = {"dev": texts[:HELD], "test": texts[HELD : 2 * HELD], "train": texts[2 * HELD :]}
        for name, part in parts.items():
            tables[name] += [{"text": text, "label": package} for text in part]
    for name, rows in tables.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tables


def accuracy(predicted: list[str], rows: list[dict[str, str]]) -> float:
    return sum(each == row["label"] for each, row in zip(predicted, rows, strict=True)) / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/example"), help="folder for everything (default: %(default)s)"
    )
    parser.add_argument("--model", type=Path, help="folder of a model to fine-tune, in place of pretraining one")
    parser.add_argument("--minutes", type=float, default=5, help="of pretraining (default: 5)")
    parser.add_argument("--steps", type=int, help="of pretraining, in place of --minutes")
    parser.add_argument("--packages", nargs="+", default=["torch", "transformers", "sklearn", "scipy", "matplotlib"])
    parser.add_argument("--examples", type=int, default=300, help="training texts of each package (default: 300)")
    parser.add_argument("--epochs", type=int, default=5, help="of fine-tuning (default: 5)")
    parser.add_argument("--lr", default="5e-4", help="of fine-tuning (default: 5e-4; 2e-4 suits MiniLM)")
    parser.add_argument("--max-bytes", default="32MB", help="text to pretrain on (default: 32MB)")
    options = parser.parse_args()
    out, model = options.out, options.model

    def fusebert(*words: object) -> None:
        subprocess.run([sys.executable, "-m", "fusebert.train", *map(str, words)], check=True)

    if model is None:
        length = ["--steps", options.steps] if options.steps else ["--minutes", options.minutes]
        prepare = ["--corpus", "pydocs", "--vocab-size", "4096", "--max-bytes", options.max_bytes, "--overwrite"]
        fusebert("prepare", *prepare, "--out", out / "corpus")
        fusebert("pretrain", "--data", out / "corpus", "--out", out / "pretrained", *length)
        model = out / "pretrained" / "hf"
    out.mkdir(parents=True, exist_ok=True)
    tables = write_tables(out, options.packages, options.examples)
    files = ["--train", out / "train.jsonl", "--dev", out / "dev.jsonl", "--seqlen", "128"]
    training = ["--batch-size", "16", "--epochs", options.epochs, "--lr", options.lr]
    fusebert("finetune", "--model", model, "--task", "classify", *files, *training, "--out", out / "classifier")
    labels = out / "labels.jsonl"
    fusebert("predict", "--model", out / "classifier" / "hf", "--input", out / "test.jsonl", "--out", labels)
    ours = [json.loads(line)["label"] for line in labels.read_text().splitlines()]

    texts, packages = ([row[key] for row in tables["train"]] for key in ("text", "label"))
    baseline = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10, max_iter=2000))
    theirs = baseline.fit(texts, packages).predict([row["text"] for row in tables["test"]])

    counts = f"{len(tables['train'])} docstrings to train on, {len(tables['test'])} to judge by"
    print(f"\n{counts}: {', '.join(options.packages)}?")
    print(f"accuracy from word frequencies: {accuracy(list(theirs), tables['test']):.1%}")
    print(f"accuracy from {model}: {accuracy(ours, tables['test']):.1%}")


if __name__ == "__main__":
    main()
