"""The format of raw texts with named labels: lines `label|label|...<TAB>text`."""

import os
import re
from collections.abc import Iterator, Sequence

from sparse_xmc.data import files

_BLANKS = " \u00a0\u3000\ufeff"  # stripped around labels; the last one is a byte order mark


def iterate_tsv(path: str | os.PathLike) -> Iterator[tuple[list[str], str]]:
    """Yield the label names and the text of each point of raw text with named labels.

    Each point is a UTF-8 line `label|label|...<TAB>text`.

    The part before the first tab may be empty, for a point without labels. Blanks around a label are removed,
    and so is a byte order mark at the beginning of the file.

    Args:
      path: the file to read.

    Yields:
      The label names of a point, and its text without changes.

    Raises:
      ValueError: the file is malformed, or begins with a header line `labels<TAB>text`; the message names the
        line. Points before the malformed line may have been yielded already.
    """
    for number, line in files.read_text_lines(path):
        names, tab, text = line.partition("\t")
        if not tab:
            fault = f"no tab in {line[:40]!r}" if line.strip() else "a blank line"
            raise ValueError(f"{path}:{number}: expected 'label|label|...<TAB>text', got {fault}")
        if "\r" in line:
            raise ValueError(f"{path}:{number}: expected lines that end in \\n or \\r\\n, got \\r within one")
        names = names.strip(_BLANKS)
        if number == 1 and re.fullmatch(r"labels?\ttexts?", f"{names}\t{text}", re.IGNORECASE):
            raise ValueError(f"{path}:1: expected no headings, got {line!r}: remove that line")
        labels = [name.strip(_BLANKS) for name in names.split("|")] if names else []
        if "" in labels:
            raise ValueError(f"{path}:{number}: expected a label on each side of a bar, got {names!r}")
        yield labels, text


def read_tsv(path: str | os.PathLike) -> tuple[list[list[str]], list[str]]:
    """Read raw text with named labels, as `iterate_tsv` does.

    Args:
      path: the file to read.

    Returns:
      `(labels, texts)`, both of length N: the label names of each point, and its text without changes.

    Raises:
      ValueError: as for `iterate_tsv`.
    """
    labels, texts = [], []
    for names, text in iterate_tsv(path):
        labels.append(names)
        texts.append(text)
    return labels, texts


def write_tsv(path: str | os.PathLike, labels: Sequence[Sequence[str]], texts: Sequence[str]) -> None:
    """Write raw text with named labels, for `read_tsv`. Equal input gives byte-identical files.

    Args:
      path: the file to write; compressed if its name ends in `.gz` or `.xz`.
      labels: the label names of each of the N points.
      texts: the N texts.

    Raises:
      ValueError: a label is empty, contains a bar, tab or line break, or has blanks around it; a text has a
        line break; or the lengths differ. No file is written in these cases.
    """
    if len(labels) != len(texts):
        raise ValueError(f"{path}: {len(labels)} lists of labels but {len(texts)} texts")
    lines = []
    for number, (names, text) in enumerate(zip(labels, texts, strict=True), start=1):
        for name in names:
            if not name or name != name.strip(_BLANKS) or re.search(r"[|\t\r\n]", name):
                raise ValueError(
                    f"{path}:{number}: a label must be non-empty, without |, tab, line break or blanks "
                    f"around it, got {name!r}"
                )
        if re.search(r"[\r\n]", text):
            raise ValueError(f"{path}:{number}: a text must not contain a line break, got {text!r}")
        lines.append(f"{'|'.join(names)}\t{text}\n")
    with files.open_binary(path, "wb") as file:
        file.writelines(line.encode() for line in lines)
