"""Reads the rows of JSON and parquet files, each with its file and line."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import decode_utf8, open_regular


def read_rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields (row, file:line) of each object: a line each in .jsonl; one after the other, or in an
    array, in .json.

    Raises UserError for what is not JSON, not an object, or not UTF-8.
    """
    read = _lines if path.suffix.lower() == ".jsonl" else _values
    try:
        for row, where in read(path):
            if not isinstance(row, dict):
                raise UserError(f"{where} should be an object, not {json_type(row)}.")
            yield row, where
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def check_text(value: Any, name: str, where: str) -> str:
    """Returns the field `name` of a row, `value`. Raises UserError unless it is text that UTF-8 can carry."""
    if value is None:
        raise UserError(f"{where}: `{name}` should be text, but is missing.")
    if not isinstance(value, str):
        raise UserError(f"{where}: `{name}` should be text, not {json_type(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: `{name}` has half a character (a lone surrogate).") from None
    return value


def json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _lines(path: Path) -> Iterator[tuple[Any, str]]:
    with open_regular(path) as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            text = decode_utf8(line, where).strip()
            if text:
                yield _parsed(json.loads, text, where=where), where


def _values(path: Path) -> Iterator[tuple[Any, str]]:
    with open_regular(path) as file:
        text = decode_utf8(file.read(), path)
    decoder = json.JSONDecoder()
    at = 0
    line = 1
    places = Counter[int]()
    beginning = re.compile(r"\S")
    if text.lstrip().startswith("["):  # an array of them
        beginning = re.compile(r"[^\s\[,\]]")
    match = beginning.search(text, at)
    while match:
        start = match.start()
        line += text.count("\n", at, start)
        places[line] += 1  # several may begin on a line
        where = f"{path}:{line}"
        if places[line] > 1:
            where += f" (value {places[line]})"
        value, at = _parsed(decoder.raw_decode, text, start, where=where)
        yield value, where
        line += text.count("\n", start, at)
        match = beginning.search(text, at)


def _parsed(parse: Callable[..., Any], *args: Any, where: str) -> Any:
    try:
        return parse(*args)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}.") from None


def read_jsonl_texts(file: Path) -> Iterator[str]:
    for row, where in read_rows(file):
        yield check_text(row.get("text"), "text", where)


def read_parquet_texts(file: Path) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"Reading {file} needs pyarrow, which is not installed: "
            "run the command as `uv run --extra parquet python -m ...`, or `pip install pyarrow`."
        ) from None
    try:
        table = parquet.ParquetFile(file)
        if "text" not in table.schema_arrow.names:
            raise UserError(
                f"{file} has no column `text`; its columns are {', '.join(table.schema_arrow.names)}."
            )
        for rows in table.iter_batches(batch_size=1024, columns=["text"]):
            for text in rows.column(0).to_pylist():
                if not isinstance(text, str | None):
                    raise UserError(f"{file}: the column `text` holds {type(text).__name__}; wanted strings.")
                yield text or ""
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{file} is damaged or not parquet: {error}.") from error
