"""Search, cluster and classify paragraphs by their vectors.

    python examples/embeddings.py --model all-MiniLM-L6-v2/ docs/*.md --query "continue a run that was stopped"

The texts are the paragraphs of Markdown files. `BertFeatures` turns them into vectors; scikit-learn does the rest.
"""

import argparse
from pathlib import Path

import numpy as np
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline

from fusebert.train.tasks.features import BertFeatures

MIN_CHARS = 80


def paragraphs(path: Path) -> list[str]:
    """The prose of a Markdown file: no headings, tables, lists or code."""
    blocks = [" ".join(block.split()) for block in path.read_text(encoding="utf-8").split("\n\n")]
    return [block for block in blocks if len(block) >= MIN_CHARS and block[0].isalpha()]


def shortened(text: str) -> str:
    return text if len(text) <= 100 else text[:99] + "…"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="Markdown files")
    parser.add_argument("--model", type=Path, required=True, help="folder of a model trained for embeddings")
    parser.add_argument("--query", default="continue a run that was stopped", help="what to search for")
    parser.add_argument("--clusters", type=int, default=5)
    options = parser.parse_args()
    pairs = [(text, path.name) for path in options.files for text in paragraphs(path)]
    texts, names = [text for text, _ in pairs], [name for _, name in pairs]

    features = BertFeatures(options.model, normalize=True)
    vectors = features.fit_transform(texts)  # [n, H], of length 1: a product is a cosine
    (query,) = features.transform([options.query])
    print(f"{len(texts)} paragraphs; nearest to {options.query!r}:")
    for i in np.argsort(-(vectors @ query))[:3]:
        print(f"  {vectors[i] @ query:.2f}  {names[i]}: {shortened(texts[i])}")

    clusters = KMeans(min(options.clusters, len(texts)), n_init=3, random_state=0).fit(vectors)
    print("clusters, each by its most central paragraph:")
    for number, centre in enumerate(clusters.cluster_centers_):
        members = np.flatnonzero(clusters.labels_ == number)
        print(f"  {len(members):3} {shortened(texts[members[np.argmax(vectors[members] @ centre)]])}")

    classifier = make_pipeline(features, LogisticRegression(C=10, max_iter=1000))
    accuracy = cross_val_score(classifier, texts, names, cv=2).mean()
    most = max(names.count(name) for name in names) / len(names)
    print(f"which file is a paragraph from? accuracy {accuracy:.0%}; always the same file: {most:.0%}")


if __name__ == "__main__":
    main()
