"""Packaging of fusebert: one import name over the folders at the top of the repository.

There is no ``fusebert/`` folder: ``package_dir`` maps ``fusebert.kernels`` to ``kernels/`` and so on, which
works installed, editable, and from the repository root. (The folder ``kernels/`` shares its name with a
package of Hugging Face's, so it must never be imported as ``kernels``.)
"""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = ["kernels", "model", "train", "bench"]

# What the kernels, the encoder and `fuse` need is PyTorch and Triton; what turns text into a model needs these too.
TRAIN = [
    "numpy>=1.26",
    "safetensors>=0.4.3",
    # WordPiece training and encoding in Rust, and the tokenizer.json every Hugging Face tool reads.
    "tokenizers>=0.20",
    # Command line driven by type hints, and the progress bar.
    "typer>=0.12",
    "tqdm>=4.66",
    # Sentence boundaries at 12-21 MB/s a core; the Python splitters reach 0.1-0.4 MB/s. Linux wheels are x86-64.
    "blingfire>=0.1.8; platform_machine == 'x86_64' or platform_machine == 'AMD64'",
    # .zst input; in the standard library only from Python 3.14.
    "zstandard>=0.22",
]
TRANSFORMERS = ["transformers>=4.56"]
PLOT = ["matplotlib>=3.8"]
BENCH = [*TRAIN, *TRANSFORMERS, *PLOT, "pytest>=8", "pytest-benchmark>=4"]

setup(
    name="fusebert",
    version="0.1.0",
    description="Fast BERT pretraining on NVIDIA GPUs: fused Triton kernels, a minimal encoder, MLM + NSP",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=[f"fusebert.{name}" for name in find_packages(include=[*FOLDERS, *(f"{name}.*" for name in FOLDERS)])],
    package_dir={f"fusebert.{name}": name for name in FOLDERS},
    package_data={"fusebert.bench": ["campaign.sh"]},
    install_requires=["torch>=2.11", "triton>=3.6; sys_platform == 'linux'"],
    extras_require={
        "train": TRAIN,
        "hf": [*TRANSFORMERS, "safetensors>=0.4.3"],
        "bench": BENCH,
        "plot": PLOT,
        "tensorboard": ["tensorboard>=2.16"],
        # sentence-transformers: a recipe of docs/drop-in.md fuses and fine-tunes the real one.
        "dev": [
            *BENCH,
            "sentence-transformers>=5",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mypy>=1.14",
        ],
    },
    entry_points={"console_scripts": ["fusebert = fusebert.train.__main__:main"]},
)
