"""Questions about texts, from SQuAD's JSON (1.1 and 2.0), or from .jsonl without answers.

A question that cannot be used is named with its file and its id.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..rows import jsonl_records


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, the text that may answer it, and its answers if they were read.

    Attributes:
        where: file and id, for messages.
        answers: (text, number of its first character in the context); none if the context has no answer.
    """

    where: str
    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...] = ()


def read_questions(source: str, answered: bool) -> Iterator[Question]:
    """The questions of a SQuAD file, or, without answers, of a .jsonl with the fields question and context.

    Args:
        answered: the answers are read.

    Raises:
        UserError: the file is missing, damaged or of an unknown kind, or a question is bad.
        OSError: the file cannot be read.
    """
    path = Path(source)
    kinds = "a .json of SQuAD" if answered else "a .json of SQuAD, or a .jsonl with question and context"
    if not path.is_file():
        raise UserError(f"{path} {'is not a file' if path.exists() else 'does not exist'}: give {kinds}")
    try:
        if path.suffix == ".jsonl" and not answered:
            with open(path, encoding="utf-8-sig") as file:
                wanted = {"question": "question", "context": "context"}
                for number, (where, parts) in enumerate(jsonl_records(file, path, wanted), 1):
                    question, context = (_text(parts, name, where) for name in wanted)
                    yield Question(where, str(number), question, context)
        elif path.suffix == ".json":
            yield from _squad(path, answered)
        else:
            raise UserError(f"{path} is of an unknown kind: give {kinds}")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} in a block of it): convert it") from error


def _squad(path: Path, answered: bool) -> Iterator[Question]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        raise UserError(f"{path}: not JSON ({error})") from error
    for article in _list(content, "data", str(path)):
        for paragraph in _list(article, "paragraphs", str(path)):
            context = _text(paragraph, "context", str(path))
            for entry in _list(paragraph, "qas", str(path)):
                name = str(entry.get("id", "")) if isinstance(entry, dict) else ""
                where = f"{path}, question {name}"
                if not name:
                    raise UserError(f"{path}: a question has no id")
                answers = _answers(entry, context, where) if answered else ()
                yield Question(where, name, _text(entry, "question", where), context, answers)


def _answers(entry: dict[str, Any], context: str, where: str) -> tuple[tuple[str, int], ...]:
    if entry.get("is_impossible"):
        return ()
    found = []
    for answer in _list(entry, "answers", where):
        text = _text(answer, "text", where)
        start = answer.get("answer_start")
        if not isinstance(start, int) or start < 0 or context[start : start + len(text)] != text or not text.strip():
            raise UserError(
                f"{where}: the answer {text[:80]!r} is not in the context at answer_start {start}; there is "
                f"{context[start : start + len(text)][:80] if isinstance(start, int) and start >= 0 else '':.80}"
            )
        # White space around an answer has no token.
        found.append((text.strip(), start + len(text) - len(text.lstrip())))
    return tuple(found)


def _list(content: Any, name: str, where: str) -> list[Any]:
    value = content.get(name) if isinstance(content, dict) else None
    if not isinstance(value, list):
        raise UserError(f"{where}: no list {name!r}: give a file in the form of SQuAD")
    return value


def _text(content: Any, name: str, where: str) -> str:
    value = content.get(name) if isinstance(content, dict) else None
    if not isinstance(value, str):
        raise UserError(f"{where}: {name!r} is not a string")
    return value
