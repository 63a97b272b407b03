"""Compressed files read line by line, and files and directories that appear whole or not at all."""

import contextlib
import gzip
import hashlib
import lzma
import os
import tempfile
import zlib
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def open_binary(path: str | os.PathLike, mode: str) -> Iterator[Any]:
    """Opens a file for reading ("rb") or writing ("wb"), through gzip or xz if it is named `.gz` or `.xz`.

    Writing the same bytes twice gives identical files.
    """
    suffix = Path(path).suffix
    with open(path, mode) as raw:
        if suffix == ".gz":
            # gzip.open would store the name and the time in the header.
            with gzip.GzipFile(filename="", mode=mode, fileobj=raw, mtime=0) as file:
                yield file
        elif suffix == ".xz":
            preset = None if mode == "rb" else 9 | lzma.PRESET_EXTREME
            with lzma.LZMAFile(raw, mode, preset=preset) as file:
                yield file
        else:
            yield raw


def read_lines(path: str | os.PathLike) -> Generator[tuple[int, bytes], None, None]:
    """Yields `(number, line)` for each line, numbered from 1 and without its line break.

    Raises:
      ValueError: the compressed data is damaged or cut off.
    """
    number = 0
    with open_binary(path, "rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                yield number, line.rstrip(b"\r\n")
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
            raise ValueError(f"{path}:{number + 1}: damaged compressed file: {error}") from error


def read_text_lines(path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    """Yields the same as `read_lines`, decoded from UTF-8.

    Raises:
      ValueError: a line is not UTF-8, or the compressed data is damaged or cut off.
    """
    for number, line in read_lines(path):
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8: {error}") from error


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file of UTF-8 text, in place of one that is there: at any time it is one or the other."""
    path = Path(path)
    side = path.with_name(f".{path.name}.partial")
    with open(side, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(side, path)


def checksums(directory: Path, parts: Iterable[str] = ("",)) -> dict[str, str]:
    """The SHA-256 of every file in a directory, by its path in there; or of some parts of it alone.

    Args:
      directory: the directory.
      parts: names of files and directories in it; those that are missing are passed over.
    """
    found = {}
    for part in parts:
        top = directory / part
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file():
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                found[path.relative_to(directory).as_posix()] = digest
    return found


def differing_file(directory: Path, expected: dict[str, str], parts: Iterable[str] = ("",)) -> str:
    """What is not as `checksums` found it, in words; "" if nothing."""
    actual = checksums(directory, parts)
    for name in sorted(expected.keys() | actual.keys()):
        if name not in actual:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is new"
        if actual[name] != expected[name]:
            return f"{name} has changed"
    return ""


@contextlib.contextmanager
def new_directory(target: str | os.PathLike) -> Iterator[Path]:
    """Yields a scratch directory that is renamed to `target` when the block ends without an exception.

    A reader therefore never sees a half-written `target`. If another process has put `target` in place
    meanwhile, that one is kept and the scratch directory is discarded.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as scratch:
        # One level down, because a TemporaryDirectory itself is readable by its owner only.
        directory = Path(scratch) / target.name
        directory.mkdir()
        yield directory
        try:
            directory.rename(target)
        except OSError:
            if not target.is_dir():
                raise
