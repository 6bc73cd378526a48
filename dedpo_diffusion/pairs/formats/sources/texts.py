"""Rows of text files: JSON, JSON lines, CSV and TSV."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.core.texts import misfit
from dedpo_diffusion.pairs.formats.sources.base import Located, Row, Source, fingerprint

DELIMITERS = {".csv": ",", ".tsv": "\t"}
LONGEST_FIELD = 1 << 30  # characters of a CSV's value, which may be a whole picture; Python's own limit is 131072
NOT_UTF8 = "is not UTF-8 text; save it again as UTF-8"


class JsonSource(Source):
    """A JSON file with a list of objects, or with an object of which one value is that list. It is read whole.

    `columns` are the keys of all rows together; a key that a row lacks is None there.

    Raises:
        UserError: no JSON, no list of objects, or several.
    """

    kind = "json"

    def __init__(self, path: str, file: Path, folder: Path | None) -> None:
        self.file, self.folder = file, folder
        self.objects = _objects(file)
        columns = _keys((f"{file} row {i}", value) for i, value in enumerate(self.objects))
        super().__init__(path, columns, len(self.objects), fingerprint([file], file.parent, contents=True))

    def rows(self, start: int = 0) -> Iterator[Located]:
        """The rows from number `start` on."""
        for i in range(start, len(self.objects)):
            yield f"{self.file} row {i}", _whole(self.objects[i], self.columns), self.folder


class JsonLinesSource(Source):
    """A text file with one JSON object a line; empty lines are passed over.

    It is read through once when opened, for its keys and its mistakes. `columns` are the keys of all rows together; a key
    that a row lacks is None there.

    Raises:
        UserError: a line that is no JSON object.
    """

    kind = "jsonl"

    def __init__(self, path: str, file: Path, folder: Path | None) -> None:
        self.file, self.folder = file, folder
        self.total = 0
        columns = _keys(self._counted())
        super().__init__(path, columns, self.total, fingerprint([file], file.parent, contents=True))

    def _counted(self) -> Iterator[tuple[str, Any]]:
        for number, line in self._lines():
            self.total += 1
            yield f"{self.file} line {number}", self._parse(number, line)

    def rows(self, start: int = 0) -> Iterator[Located]:
        """The rows from number `start` on."""
        for number, line in islice(self._lines(), start, None):
            yield f"{self.file} line {number}", _whole(self._parse(number, line), self.columns), self.folder

    def _lines(self) -> Iterator[tuple[int, str]]:
        try:
            with open(self.file, encoding="utf-8-sig") as text:
                for number, line in enumerate(text, 1):
                    if line.strip():
                        yield number, line
        except UnicodeDecodeError as error:
            raise UserError(f"{self.file} {NOT_UTF8}") from error

    def _parse(self, number: int, line: str) -> Any:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.file} line {number} is no JSON ({error}); each line must be one object: mend it") from error
        _check_characters(line, [(f"{self.file} line {number}", value)])
        return value


class CsvSource(Source):
    """A .csv (commas) or .tsv (tabs) file with a header; every value is text. Empty lines are passed over.

    A column without a name (as pandas writes its index) is called column_0 after its place.

    Raises:
        UserError: no header, a name that comes twice, or separators that the file's ending does not tell.
    """

    kind = "csv"

    def __init__(self, path: str, file: Path, folder: Path | None) -> None:
        self.file, self.folder = file, folder
        self.delimiter = DELIMITERS[file.suffix.lower()]
        _, header = next(self._records(), (0, []))
        super().__init__(path, self._names(header), None, fingerprint([file], file.parent, contents=True))

    def _names(self, header: list[str]) -> list[str]:
        names = [name.strip() or f"column_{place}" for place, name in enumerate(header)]
        if not names:
            raise UserError(f"{self.file} is empty; its first line must name the columns")
        other = next((sign for sign in ";\t," if sign != self.delimiter and sign in names[0]), None)
        if len(names) == 1 and other:
            used, wanted = ({",": "commas", ";": "semicolons", "\t": "tabs"}[sign] for sign in (other, self.delimiter))
            raise UserError(f"{self.file} seems to have {used} between its columns, and needs {wanted}; save it again (.tsv has tabs)")
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{self.file} has two columns named {name!r}; rename or remove one")
        return names

    def rows(self, start: int = 0) -> Iterator[Located]:
        """The rows from number `start` on."""
        for line, values in islice(self._records(), 1 + start, None):
            if len(values) != len(self.columns):
                raise UserError(
                    f"{self.file} line {line} has {len(values)} values, and the header names {len(self.columns)} columns; "
                    "mend the line (a value with a separator or a line break in it needs quotes)"
                )
            yield f"{self.file} line {line}", dict(zip(self.columns, values, strict=True)), self.folder

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """Number of its first line, and values, of every record, the header's included."""
        try:
            with open(self.file, encoding="utf-8-sig", newline="") as text:
                csv.field_size_limit(LONGEST_FIELD)
                reader = csv.reader(text, delimiter=self.delimiter, strict=True)
                while True:
                    line = reader.line_num + 1
                    try:
                        values = next(reader)
                    except StopIteration:
                        return
                    except csv.Error as error:
                        raise UserError(f"{self.file} line {line} cannot be read ({error}); mend its quotes") from error
                    if values:
                        yield line, values
        except UnicodeDecodeError as error:
            raise UserError(f"{self.file} {NOT_UTF8}") from error


def _check_characters(text: str, rows: Iterable[tuple[str, Any]]) -> None:
    """No half characters, which JSON can say and no file can hold; `text` is the JSON of all rows, each of which has a place."""
    if re.search(r"\\u[dD]", text):
        for where, row in rows:
            wrong = misfit(json.dumps(row, ensure_ascii=False))
            if wrong is not None:
                raise UserError(f"{where} {wrong}; mend it")


def _objects(file: Path) -> list[Any]:
    """The rows of a JSON file."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{file} {NOT_UTF8}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON ({error}); mend it, or name it .jsonl if each line is an object") from error
    if isinstance(value, dict):
        lists = [name for name, held in value.items() if isinstance(held, list)]
        if len(lists) != 1:
            raise UserError(
                f"{file} is an object with {len(lists)} lists ({', '.join([*value][:10])}), and must be a list of rows, or hold one; "
                'write it as [{"prompt": ..., ...}, ...]'
            )
        value = value[lists[0]]
    if not isinstance(value, list):
        raise UserError(f"{file} holds {type(value).__name__}, and must hold a list of objects")
    _check_characters(text, ((f"{file} row {i}", row) for i, row in enumerate(value)))
    return value


def _keys(values: Iterator[tuple[str, Any]]) -> list[str]:
    """The keys of all rows, in the order they come up."""
    keys: dict[str, None] = {}
    for where, value in values:
        if not isinstance(value, dict):
            raise UserError(f"{where} is {type(value).__name__}, and must be an object of named values; mend it")
        keys.update(dict.fromkeys(value))
    return list(keys)


def _whole(row: Row, columns: tuple[str, ...]) -> Row:
    return row if len(row) == len(columns) else {name: row.get(name) for name in columns}
