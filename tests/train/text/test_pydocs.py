"""Docstrings of installed packages: found as ``ast.walk`` finds them, never by importing."""

import argparse
import ast
import heapq
import inspect
import json
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from fusebert.train.text.pydocs import MIN_CHARS, collect, docstrings, python_files

LONG = "word " * 20 + "end."


def run(tmp_path, sources, **options):
    files = []
    for name, source in sources.items():
        files.append(tmp_path / name)
        files[-1].write_bytes(source if isinstance(source, bytes) else source.encode())
    found = collect(tmp_path / "out.jsonl", files=files, **{"workers": 1, **options})
    return [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()], found


@pytest.mark.parametrize("module", [argparse, heapq, textwrap, inspect, np.polynomial.polynomial])
def test_the_same_as_walking_the_whole_tree(module):
    source = Path(module.__file__).read_bytes()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    expected = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    assert sorted(docstrings(source)) == sorted(text for text in expected if text and len(text) > MIN_CHARS)


def test_wherever_a_definition_may_stand():
    definition = "async def {0}():\n    '''{0}, " + LONG + "'''\n"
    source = f"'''module, {LONG}'''\nclass C:\n    '''class, {LONG}'''\n" + textwrap.indent(
        definition.format("a"), "    "
    )
    for name, opening in {
        "b": "if x:",
        "c": "elif y:",
        "d": "else:",
        "e": "try:",
        "f": "except E:",
        "g": "finally:",
        "h": "match x:\n  case 1:",
        "i": "with x:",
        "j": "def outer():",
    }.items():
        source += opening + "\n" + textwrap.indent(definition.format(name), "    ")
    source += "lambda: 0\nx if y else z\nf'''not a docstring, " + LONG + "'''\n"
    assert [text.split(",")[0] for text in docstrings(source.encode())] == ["module", "class", *"abcdefghij"]


def test_a_module_is_a_document_and_each_docstring_counts_once(tmp_path):
    documents, found = run(
        tmp_path,
        {
            "1.py": f"'''One, {LONG}'''\ndef f():\n    '''Two,\n    {LONG}\n    '''\ndef g():\n    '''Short.'''\n",
            "2.py": f"'''Three, {LONG}'''\n'''No docstring, {LONG}'''\ndef h():\n    '''One, {LONG}'''\n",
            "3.py": f"def i():\n    '''One, {LONG}'''\n",
        },
    )
    assert documents == [f"One, {LONG}\n\nTwo,\n{LONG}", f"Three, {LONG}"]
    assert found == (2, 3, sum(map(len, documents)), 0)


def test_what_is_not_python_is_counted(tmp_path, recwarn):
    documents, found = run(
        tmp_path,
        {
            "marker.py": f"'''Fine, {LONG}'''\nopen({str(tmp_path / 'imported')!r}, 'w')\nraise SystemExit\n",
            "python2.py": "print 'x'",
            "nul.py": b"x = 1\0",
            "deep.py": "(" * 10_000,
            "big.py": f"'''Table, {LONG}'''\n" + "#" * (2 << 20),
            "latin.py": f"# coding: latin-1\n'''Café, {LONG}'''\n".encode("latin-1"),
            "escape.py": f"'''Regex \\d, {LONG}'''\n",
            "surrogate.py": f"'''\\ud800 {LONG}'''\n",
        },
    )
    assert [d.split(",")[0] for d in documents] == ["Fine", "Café", "Regex \\d"]
    assert found.unparsable == 4
    assert not (tmp_path / "imported").exists()
    assert not recwarn.list


def test_a_size_cap_keeps_a_prefix_and_workers_do_not_show(tmp_path):
    sources = {f"{i:03}.py": f"'''Number {i}, {LONG}'''\n" for i in range(100)}
    everything, found = run(tmp_path, sources)
    assert run(tmp_path, sources, workers=2) == (everything, found)
    some, found = run(tmp_path, sources, max_bytes=4000)
    assert some == everything[: len(some)]
    assert found.text_bytes == sum(map(len, some)) <= 4000 < sum(map(len, everything[: len(some) + 1]))
    assert found.docstrings == found.modules == len(some)


def test_the_running_interpreters_files():
    files = python_files()
    assert {Path(argparse.__file__), Path(np.polynomial.polynomial.__file__)} <= set(files)
    # A prefix mixes packages.
    assert len({path.parent for path in files[:200]}) > 50
    assert all(path.suffix == ".py" for path in files[:200])
    assert "numpy.testing.tests" not in sys.modules  # listing imports nothing
