"""Text to a pretrained BERT to a classifier: which package is a sentence from, when few are labelled?

    python examples/pretrain_and_finetune.py --out runs/example --minutes 5
    python examples/pretrain_and_finetune.py --out runs/minilm --model all-MiniLM-L6-v2/ --lr 2e-4 --layer-decay 1

1. `fusebert prepare` and `fusebert pretrain` on the docstrings of the installed packages (not with --model).
2. `fusebert finetune` on the first sentences of a few docstrings of each package, without the package's name, and
   `fusebert predict` on sentences of other files.
3. The same for a baseline: word frequencies (tf-idf) and logistic regression.

What a model learned from text without labels counts where labels are few and texts short. Whole docstrings by the
hundred, most with the same words, word frequencies tell apart better than a small model does.
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

MIN_CHARS, MAX_CHARS = 40, 200
DEV, TEST = 30, 200  # sentences of each package to choose the best model by, and to judge it by


def sentences(package: str) -> list[tuple[Path, str]]:
    """The first sentences of an installed package's docstrings that do not name it, each once, with their files."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"--packages: {package!r} is not an installed package")
    found: dict[str, Path] = {}
    paths = sorted(Path(spec.submodule_search_locations[0]).rglob("*.py"))
    random.Random(0).shuffle(paths)
    for path in paths[:400]:
        try:
            nodes = list(ast.walk(ast.parse(path.read_bytes())))
        except (SyntaxError, ValueError):
            continue
        for node in nodes:
            text = ast.get_docstring(node) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) else None
            text = " ".join((text or "").split()).split(". ")[0][:MAX_CHARS]
            if len(text) >= MIN_CHARS and package not in text.lower():
                found.setdefault(text, path)
    return [(path, text) for text, path in found.items()]


def write_tables(out: Path, packages: list[str], examples: int) -> dict[str, list[dict[str, str]]]:
    """train.jsonl, dev.jsonl and test.jsonl in ``out``: no file of a package has sentences in two of them."""
    tables: dict[str, list[dict[str, str]]] = {"train": [], "dev": [], "test": []}
    for package in packages:
        found = sentences(package)
        paths = sorted({path for path, _ in found})
        random.Random(1).shuffle(paths)
        for (name, count), start in zip((("test", TEST), ("dev", DEV), ("train", examples)), range(3), strict=True):
            chosen = set(paths[start::3])
            texts = [text for path, text in found if path in chosen]
            random.Random(2).shuffle(texts)
            tables[name] += [{"text": text, "label": package} for text in texts[:count]]
    for name, rows in tables.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tables


def accuracy(predicted: list[str], rows: list[dict[str, str]]) -> float:
    return sum(each == row["label"] for each, row in zip(predicted, rows, strict=True)) / len(rows)


def from_word_frequencies(tables: dict[str, list[dict[str, str]]]) -> float:
    """The baseline's accuracy. Like the model's, its settings are those that are best on dev."""
    best = (0.0, 0.0)
    for strength in (1, 10, 100):
        for words in ((1, 1), (1, 2)):
            learner = make_pipeline(
                TfidfVectorizer(sublinear_tf=True, ngram_range=words), LogisticRegression(C=strength, max_iter=2000)
            )
            learner.fit([row["text"] for row in tables["train"]], [row["label"] for row in tables["train"]])
            dev, test = (
                accuracy(list(learner.predict([row["text"] for row in tables[name]])), tables[name])
                for name in ("dev", "test")
            )
            best = max(best, (dev, test), key=lambda scores: scores[0])
    return best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/example"), help="folder for everything (default: %(default)s)"
    )
    parser.add_argument("--model", type=Path, help="folder of a model to fine-tune, in place of pretraining one")
    parser.add_argument("--minutes", type=float, default=5, help="of pretraining (default: 5)")
    parser.add_argument("--steps", type=int, help="of pretraining, in place of --minutes")
    parser.add_argument("--packages", nargs="+", default=["torch", "transformers", "sklearn", "scipy", "matplotlib"])
    parser.add_argument("--examples", type=int, default=16, help="labelled sentences of each package (default: 16)")
    parser.add_argument("--epochs", type=int, default=20, help="of fine-tuning (default: 20)")
    parser.add_argument("--lr", default="3e-3", help="of fine-tuning (default: 3e-3; 2e-4 suits MiniLM)")
    parser.add_argument("--layer-decay", default="0.4", help="of the rate, a layer down (default: 0.4; 1 suits MiniLM)")
    parser.add_argument("--max-bytes", default="32MB", help="text to pretrain on (default: 32MB)")
    options = parser.parse_args()
    out, model = options.out, options.model

    def fusebert(*words: object) -> None:
        subprocess.run([sys.executable, "-m", "fusebert.train", *map(str, words)], check=True)

    if model is None:
        length = ["--steps", options.steps] if options.steps else ["--minutes", options.minutes]
        prepare = ["--corpus", "pydocs", "--vocab-size", "8192", "--max-bytes", options.max_bytes, "--overwrite"]
        fusebert("prepare", *prepare, "--out", out / "corpus")
        fusebert("pretrain", "--data", out / "corpus", "--out", out / "pretrained", "--recipe", "fast", *length)
        model = out / "pretrained" / "hf"
    out.mkdir(parents=True, exist_ok=True)
    tables = write_tables(out, options.packages, options.examples)
    files = ["--train", out / "train.jsonl", "--dev", out / "dev.jsonl", "--seqlen", "64"]
    training = ["--batch-size", "8", "--epochs", options.epochs, "--lr", options.lr]
    training += ["--layer-decay", options.layer_decay]
    fusebert("finetune", "--model", model, "--task", "classify", *files, *training, "--out", out / "classifier")
    labels = out / "labels.jsonl"
    fusebert("predict", "--model", out / "classifier" / "hf", "--input", out / "test.jsonl", "--out", labels)
    ours = [json.loads(line)["label"] for line in labels.read_text().splitlines()]

    counts = f"{len(tables['train'])} sentences to learn from, {len(tables['test'])} to judge by"
    print(f"\n{counts}: {', '.join(options.packages)}?")
    print(f"accuracy from word frequencies: {from_word_frequencies(tables):.1%}")
    print(f"accuracy from {model}: {accuracy(ours, tables['test']):.1%}")


if __name__ == "__main__":
    main()
