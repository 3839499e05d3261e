"""Reads the CSV table of sentences of a COCO file."""

import csv
from collections.abc import Container, Iterator
from pathlib import Path

from crislit.data.custom.builder import Problem
from crislit.data.custom.values import parse_sentences, parse_split, parse_whole
from crislit.errors import InputError, counted, require, see

COLUMNS = ("ann_id", "sentence", "split")
Groups = dict[int, tuple[str, list[tuple[int, str]]]]
"""Each annotation's split, and its sentences with their line numbers."""


def group_rows(
    table: Path, annotations: Container[int], problems: list[Problem], default_split: str
) -> Groups:
    """Return each annotation's split and sentences.

    Rows of the CSV that cannot be used are appended to the problems.

    Raises:
        InputError: If the file is missing or is not such a table.
    """
    groups: Groups = {}
    for number, row in _read_rows(table, problems):
        split = None
        try:
            split = parse_split(row.get("split") or None, default_split)
            ann_id = parse_whole(row["ann_id"], "ann_id")
            if ann_id not in annotations:
                raise InputError(f"annotation {ann_id} is not in the instances file")
            sentence = parse_sentences({"sentence": row["sentence"]})[0]
            if len(sentence.splitlines()) > 1:
                raise InputError(
                    f"a sentence spans several lines, is a quote missing? Found {sentence!r}"[:200]
                )
            first_split, sentences = groups.setdefault(ann_id, (split, []))
            if split != first_split:
                raise InputError(
                    f"annotation {ann_id} has split {split!r} here, and {first_split!r} in "
                    f"line {sentences[0][0]}"
                )
            sentences.append((number, sentence))
        except (InputError, ValueError) as error:
            problems.append(Problem(number, str(error), split))
    return groups


def _read_rows(path: Path, problems: list[Problem]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a CSV file with their line numbers.

    Columns are separated by commas, or by semicolons or tabs as spreadsheets of some languages
    write them. Rows with more or fewer fields than the header are problems.
    """
    require(path.is_file(), f"{path} not found")
    line = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            require(
                not first.lstrip().startswith(("{", "[")),
                f"{path} holds JSON, expected a CSV table with the columns ann_id, sentence, split",
            )
            file.seek(0)
            separator = next((mark for mark in ",;\t" if mark in first), ",")
            reader = csv.reader(file, delimiter=separator, skipinitialspace=True, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            _check_header(header, path)
            for row in reader:
                line = reader.line_num
                if len(row) == len(header):
                    if any(field.strip() for field in row):
                        yield line, dict(zip(header, row, strict=True))
                elif any(field.strip() for field in row):
                    problems.append(Problem(line, _length_error(row, header, separator)))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not a CSV file in UTF-8: {error}. Save it as UTF-8{see('csv-commas')}"
        ) from error
    except csv.Error as error:
        raise InputError(
            f"{path} is not a CSV file in UTF-8: {error}, after line {line or 1}. Put quotation "
            f'marks around a whole sentence, and write one within it as ""{see("csv-commas")}'
        ) from error


def _check_header(header: list[str], path: Path) -> None:
    found = ", ".join(header) or "none"
    require(
        {"ann_id", "sentence"} <= set(header),
        f"{path} should have the columns ann_id, sentence, split, found {found:.200}",
    )
    require(len(set(header)) == len(header), f"{path} has a column twice: {found:.200}")
    unknown = [name for name in header if name not in COLUMNS]
    require(
        not unknown,
        f"{path} has an unknown column {', '.join(unknown)!r:.60}: leave only ann_id, sentence and "
        "split",
    )


def _length_error(row: list[str], header: list[str], separator: str) -> str:
    name = {",": "a comma", ";": "a semicolon", "\t": "a tab"}[separator]
    cure = (
        f"put quotation marks around a sentence with {name}"
        if len(row) > len(header)
        else "write every column"
    )
    return f"the line has {counted(len(row), 'field')}, the header {len(header)}: {cure}"
