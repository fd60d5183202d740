"""Readers of files that are not text or do not end: bombs, endless lines, loops, FIFOs, unreadable folders."""

import bz2
import gzip
import lzma
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from fusebert.train.errors import UserError
from fusebert.train.text.files import find_files
from fusebert.train.text.readers import DOCUMENT_CHARS, read_documents
from fusebert.train.text.text_file import TextFile

MIB = 1 << 20


def peak_of(path: Path, most_documents: int | None = None) -> tuple[int, int]:
    """(documents read, the most bytes allocated meanwhile). zstandard's own buffers are not counted."""
    count = 0
    tracemalloc.start()
    try:
        for _ in read_documents(TextFile(path, path.name)):
            count += 1
            if count == most_documents:
                break
        return count, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def zstd_of_repeats(size: int) -> bytes:
    """``size`` bytes of short documents as .zst, two thousand times smaller."""
    packer = zstandard.ZstdCompressor(level=3).compressobj()
    block = b"word\n\n" * 100_000
    return b"".join(packer.compress(block) for _ in range(size // len(block))) + packer.flush()


def test_compressed_bombs_are_read_in_pieces(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.txt.zst"
    bomb.write_bytes(zstd_of_repeats(128 * MIB))
    assert bomb.stat().st_size < 64 << 10
    count, peak = peak_of(bomb, most_documents=100_000)
    assert count == 100_000
    assert peak < 24 * MIB
    bomb = tmp_path / "bomb.txt.gz"
    bomb.write_bytes(gzip.compress(b"word\n\n" * (10 * MIB), compresslevel=1))
    assert peak_of(bomb, most_documents=100_000)[1] < 24 * MIB


@pytest.mark.parametrize("suffix", [".bz2", ".xz"])
def test_bombs_of_streams_are_read_in_pieces(tmp_path: Path, suffix: str) -> None:
    packer = bz2.BZ2Compressor() if suffix == ".bz2" else lzma.LZMACompressor(preset=0)
    block = b"word\n\n" * 200_000
    bomb = tmp_path / f"bomb.txt{suffix}"
    bomb.write_bytes(b"".join([*(packer.compress(block) for _ in range(12)), packer.flush()]))
    assert bomb.stat().st_size < 64 << 10
    count, peak = peak_of(bomb, most_documents=100_000)
    assert count == 100_000
    assert peak < 22 * MIB


def test_a_large_dictionary_is_refused(tmp_path: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 28}]
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"text " * 1000, filters=filters))
    with pytest.raises(UserError, match=r"a\.txt\.xz needs over 128 MiB .* smaller dictionary"):
        list(read_documents(TextFile(tmp_path / "a.txt.xz", "a.txt.xz")))


def test_a_bomb_of_a_single_line_of_json_is_refused(tmp_path: Path) -> None:
    packer = zstandard.ZstdCompressor().compressobj()
    parts = [packer.compress(b'{"text": "'), *(packer.compress(b"a" * MIB) for _ in range(35)), packer.flush()]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(parts))
    with pytest.raises(UserError, match="line 1 is over 32 MiB long"):
        peak_of(tmp_path / "a.jsonl.zst")


def test_a_large_window_is_refused(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.txt.zst").write_bytes(packer.compress(b"text " * 1000) + packer.flush())
    with pytest.raises(UserError, match=r"a\.txt\.zst needs over 128 MiB .* without that option"):
        list(read_documents(TextFile(tmp_path / "a.txt.zst", "a.txt.zst")))


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("level", [1, 19])
def test_every_zst_file_is_read_whole_or_called_cut_short(tmp_path: Path, level: int, checksum: bool) -> None:
    """Frames of several blocks, compressed, raw and repeated; an empty frame; a frame of other data."""
    text = os.urandom(150_000).hex().encode() + b"\n" + b"same " * 60_000 + b"\n"
    packer = zstandard.ZstdCompressor(level=level, write_checksum=checksum)
    skippable = b"\x53\x2a\x4d\x18" + (1000).to_bytes(4, "little") + bytes(1000)
    frames = [packer.compress(text), packer.compress(b""), skippable, packer.compress(text)]
    path = tmp_path / "a.txt.zst"
    path.write_bytes(b"".join(frames))
    documents = list(read_documents(TextFile(path, "a")))
    assert "".join(documents).replace("\n", "").replace(" ", "") == (text * 2).decode().replace("\n", "").replace(
        " ", ""
    )
    whole = path.read_bytes()
    for kept in (1, 3, 5, 7, len(frames[0]) - 1, len(frames[0]) + 2, len(whole) - len(frames[3]) - 1, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(UserError, match="cut short"):
            list(read_documents(TextFile(path, "a")))


@pytest.mark.parametrize("letter", ["a", "é", "🙂"])
def test_one_endless_line_of_text_is_cut(tmp_path: Path, letter: str) -> None:
    path, count = tmp_path / "a.txt", 16 * MIB
    path.write_bytes(b"x" + letter.encode() * count)  # characters straddle the ends of blocks
    pieces, size = [], 0
    tracemalloc.start()
    for document in read_documents(TextFile(path, "a")):
        pieces.append(len(document))
        size += document.count(letter)
        assert "\ufffd" not in document
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == count
    assert max(pieces) <= DOCUMENT_CHARS
    assert peak < 24 * MIB


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": ' + b"7" * 5000 + b', "text": "a"}', r"a\.jsonl:2: not JSON \(.*4300"),
        (b'{"text": ' + b'{"a":' * 50_000, r"a\.jsonl:2: not JSON.*nested too deeply"),
    ],
    ids=["5,000 digits", "deep"],
)
def test_json_beyond_the_parsers_limits(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line)
    with pytest.raises(UserError, match=message) as error:
        list(read_documents(TextFile(path, str(path))))
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:the link")
def test_looping_links_are_not_followed(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "1.txt").write_text("text")
    for name in ("x", "y", "z"):  # with glob.glob 3⁴⁰ paths
        (inner / name).symlink_to(tmp_path)
    (inner / "itself").symlink_to(inner / "itself")
    for pattern in ("**/*.txt", "**", "a/**/1.txt", "*/*/1.txt", "a/b/*.txt"):
        assert [file.path for file in find_files([str(tmp_path / pattern)])] == [inner / "1.txt"], pattern
    with pytest.warns(UserWarning, match="b/x to a folder is not followed: name it as an input"):
        assert len(find_files([str(tmp_path)])) == 1
    with pytest.warns(UserWarning, match="is not followed"):
        assert len(find_files([str(inner / "x" / "a")])) == 1


def test_patterns_match_as_globs_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.txt", "a/.2.txt", "a/b/3.txt", ".c/4.txt", "d/b/e/5.txt", "6.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    for pattern, expected in {
        "*.txt": ["6.txt"],
        "**/*.txt": ["6.txt", "a/1.txt", "a/b/3.txt", "d/b/e/5.txt"],
        "*/b/**/*.txt": ["a/b/3.txt", "d/b/e/5.txt"],
        "[ab]/[!b]*.txt": ["a/1.txt"],
        "a/.*.txt": ["a/.2.txt"],
        ".c/?.txt": [".c/4.txt"],
        "./a/*.txt": ["a/1.txt"],
        "a/../*.txt": ["a/../6.txt"],
        str(tmp_path / "*" / "1.txt"): [str(tmp_path / "a/1.txt")],
    }.items():
        assert [file.name for file in find_files([pattern])] == expected, pattern


def test_what_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "1.txt").write_text("text")
    closed = tmp_path / "open" / "closed"
    closed.mkdir()
    scandir = os.scandir

    def denied(path: str) -> object:  # the tests may run as root, to whom nothing is closed
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    for given in (tmp_path, tmp_path / "open", tmp_path / "**" / "*.txt", tmp_path / "*" / "*" / "*.txt"):
        with pytest.raises(UserError, match=r"open/closed cannot be read \(Permission denied\)"):
            find_files([str(given)])
    assert len(find_files([str(tmp_path / "open" / "*.txt")])) == 1


def test_what_is_no_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "fine.txt").write_text("text")
    for name, make, message in (
        ("pipe.txt", os.mkfifo, r"pipe\.txt is not a regular file.*standard input"),
        ("broken.txt", lambda path: os.symlink("nothing", path), r"broken\.txt cannot be read \(No such file"),
        ("loop.txt", lambda path: os.symlink(path, path), r"loop\.txt cannot be read \(Too many levels"),
    ):
        make(tmp_path / name)
        for given in (tmp_path / name, tmp_path, tmp_path / "*.txt"):
            with pytest.raises(UserError, match=message):
                find_files([str(given)])
        (tmp_path / name).unlink()


def test_a_bomb_fits_in_little_memory(tmp_path: Path) -> None:
    """The whole process, the decompressor included, in 512 MiB of addresses."""
    bomb = tmp_path / "bomb.txt.zst"
    bomb.write_bytes(zstd_of_repeats(64 * MIB))
    script = (
        "import resource, sys, itertools, pathlib\n"
        "resource.setrlimit(resource.RLIMIT_AS, (512 << 20, 512 << 20))\n"
        "from fusebert.train.text.readers import *\n"
        "file = TextFile(pathlib.Path(sys.argv[1]), 'bomb')\n"
        "print(sum(1 for _ in itertools.islice(read_documents(file), 400_000)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(bomb)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "400000\n"), done.stderr
