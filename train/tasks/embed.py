"""``fusebert embed``: one vector a text, packed by length."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from ...model.atomic import replace_file
from ...model.heads import POOLINGS, SentenceEncoder
from ..errors import UserError
from ..step.step import autocast
from .models import Machine, choose_machine, load, open_folder, sentence_settings
from .packing import pack_texts, token_budget
from .rows import Columns, read_rows
from .settings import EmbedSettings, ModelSettings
from .tokens import EncodedText, TextTokenizer

BLOCK = 4096  # texts that are sorted by length together


class Embedder:
    """A model that embeds texts.

    Args:
        settings: model, device, precision, seqlen, tokens_per_batch.
        pooling: one of `POOLINGS`, or "auto".
        normalize: scale each vector to length 1; None: what the folder says, else not.

    Attributes:
        size: H, of a vector.
        notes: what to tell the user about the weights.
        tokenizer: counts the texts that were cut.

    Raises:
        UserError, ValueError: the model or an option cannot be used.
    """

    def __init__(self, settings: ModelSettings, pooling: str = "auto", normalize: bool | None = None) -> None:
        if pooling not in ("auto", *POOLINGS):
            raise UserError(f"--pooling {pooling!r} is not known: choose one of auto, {', '.join(POOLINGS)}")
        self._machine: Machine = choose_machine(settings)
        folder = open_folder(settings.model)
        stated: dict[str, Any] = {}
        if pooling == "auto" or normalize is None:
            stated = sentence_settings(settings.model) or {}
        self.pooling: str = stated.get("pooling", "mean") if pooling == "auto" else pooling
        self.normalize: bool = stated.get("normalize", False) if normalize is None else normalize
        self.tokenizer = TextTokenizer(folder, settings.seqlen)
        model = SentenceEncoder(folder.config, self.pooling, folder.embedding_size)
        self.notes = load(model, folder, needs=("pooler",) if self.pooling == "pooler" else ())
        self._model = model.to(self._machine.device).eval()
        self.size = folder.config.hidden_size

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, H], in the order of ``texts``."""
        return embed_encoded(self._model, self.tokenizer(texts), self._machine, self.normalize)


@torch.no_grad()
def embed_encoded(
    model: SentenceEncoder, texts: Sequence[EncodedText], machine: Machine, normalize: bool
) -> np.ndarray:
    """float32 [n, H], in the order of ``texts``, which are packed by length. Leaves the model in evaluation mode."""
    model.eval()
    vectors = np.empty((len(texts), model.config.hidden_size), dtype=np.float32)
    for chosen in token_budget([len(each) for each in texts], machine.tokens_per_batch):
        batch = pack_texts([texts[i] for i in chosen]).to(machine.device, non_blocking=True)
        with autocast(machine.device, machine.compute_dtype):
            found = model.vectors(batch)  # [S, H]
        if normalize:
            found = F.normalize(found, dim=1)
        vectors[chosen] = found.cpu().numpy()
    return vectors


Each = TypeVar("Each")


def blocks(items: Iterable[Each], size: int = BLOCK) -> Iterator[list[Each]]:
    """``items`` in lists of ``size``, the last one shorter."""
    source = iter(items)
    while block := list(itertools.islice(source, size)):
        yield block


class VectorWriter(Protocol):
    """Appends vectors to a file."""

    def write(self, texts: list[str], vectors: np.ndarray) -> None: ...

    def close(self) -> None: ...


class NpyWriter:
    """A .npy file that grows: the header, in which numpy leaves room for the number of rows, is written again last."""

    def __init__(self, path: Path, size: int) -> None:
        self._file = open(path, "wb")  # noqa: SIM115
        self._rows, self._size = 0, size
        self._header()

    def _header(self) -> None:
        self._file.seek(0)
        content = {"descr": "<f4", "fortran_order": False, "shape": (self._rows, self._size)}
        np.lib.format.write_array_header_1_0(self._file, content)

    def write(self, texts: list[str], vectors: np.ndarray) -> None:
        """Appends ``vectors``, float32 [n, H]."""
        self._file.write(np.ascontiguousarray(vectors, dtype="<f4").tobytes())
        self._rows += len(vectors)

    def close(self) -> None:
        """Writes the number of rows and closes the file."""
        self._header()
        self._file.close()


class ParquetWriter:
    """A .parquet file with the columns text and embedding."""

    def __init__(self, path: Path, size: int) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ModuleNotFoundError as error:
            raise UserError("writing .parquet needs a package: pip install pyarrow") from error
        self._arrow = pyarrow
        self._kind = pyarrow.list_(pyarrow.float32(), size)
        self._schema = pyarrow.schema([("text", pyarrow.string()), ("embedding", self._kind)])
        self._writer = pyarrow.parquet.ParquetWriter(path, self._schema)

    def write(self, texts: list[str], vectors: np.ndarray) -> None:
        """Appends a row group."""
        flat = self._arrow.array(vectors.reshape(-1))
        column = self._arrow.FixedSizeListArray.from_arrays(flat, type=self._kind)
        self._writer.write_table(self._arrow.table([self._arrow.array(texts), column], schema=self._schema))

    def close(self) -> None:
        """Writes the footer and closes the file."""
        self._writer.close()


WRITERS: dict[str, Callable[[Path, int], VectorWriter]] = {".npy": NpyWriter, ".parquet": ParquetWriter}


def embed(settings: EmbedSettings) -> list[str]:
    """Runs ``fusebert embed``: writes ``settings.out``, whole or not at all. Memory is bounded.

    Returns:
        Lines for the user.

    Raises:
        UserError, ValueError: an option, the model or a row cannot be used.
        OSError: a file cannot be read or written.
    """
    make_writer = WRITERS.get(settings.out.suffix)
    if make_writer is None:
        raise UserError(f"--out {settings.out} must end in {' or '.join(WRITERS)}")
    embedder = Embedder(settings, settings.pooling, settings.normalize)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    rows = read_rows(settings.input, Columns(text=settings.text))
    with replace_file(settings.out) as partial, contextlib.closing(make_writer(partial, embedder.size)) as writer:
        with tqdm(unit=" texts", dynamic_ncols=True, disable=None) as bar:
            for texts in blocks(row.text for row in rows):
                writer.write(texts, embedder(texts))
                count += len(texts)
                bar.update(len(texts))
        if count == 0:
            raise UserError(f"{settings.input} has no texts")
    scaled = ", scaled to length 1" if embedder.normalize else ""
    return [
        *embedder.notes,
        *filter(None, [embedder.tokenizer.warning()]),
        f"{count:,} texts, {embedder.size} numbers each ({embedder.pooling}{scaled}), in {settings.out}",
    ]
