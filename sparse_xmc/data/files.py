"""Reading of compressed files by lines, and atomic writing of files and directories."""

import contextlib
import gzip
import hashlib
import json
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

INTEGER = rb"\d{1,18}"  # pattern of integers in data files: at most 18 digits, which fit into 64 bits
LARGEST_SIZE = 2**31 - 1  # maximum number of points, labels or features


@contextlib.contextmanager
def open_binary(path: str | os.PathLike, mode: str) -> Iterator[Any]:
    """Open a file for reading ("rb") or writing ("wb"), with gzip or xz if its name ends in `.gz` or `.xz`.

    Writing is atomic, as in `new_file`. Writing the same bytes twice gives identical files.
    """
    suffix = Path(path).suffix
    with new_file(path) if mode == "wb" else open(path, mode) as raw:
        if suffix == ".gz":
            # gzip.open would store the file name and the time in the header.
            with gzip.GzipFile(filename="", mode=mode, fileobj=raw, mtime=0) as file:
                yield file
        elif suffix == ".xz":
            preset = None if mode == "rb" else 9 | lzma.PRESET_EXTREME
            with lzma.LZMAFile(raw, mode, preset=preset) as file:
                yield file
        else:
            yield raw


def read_lines(path: str | os.PathLike) -> Generator[tuple[int, bytes], None, None]:
    """Yield `(number, line)` for each line of a file, numbered from 1 and without its line break.

    Raises:
      ValueError: the compressed data is damaged or truncated.
    """
    number = 0
    with open_binary(path, "rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                yield number, line.rstrip(b"\r\n")
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
            raise ValueError(f"{path}:{number + 1}: damaged compressed file: {error}") from error


def first_line(path: str | os.PathLike) -> bytes:
    """Return the first line of a file, as `read_lines` does; empty if the file is empty."""
    with contextlib.closing(read_lines(path)) as lines:
        return next(lines, (1, b""))[1]


def excerpt(text: bytes) -> str:
    """Return the beginning of a part of a file, quoted, for an error message."""
    return repr(text[:40].decode(errors="replace"))


def read_text_lines(path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    """Yield `(number, line)` for each line of a UTF-8 file, as `read_lines` does, with decoded lines.

    Raises:
      ValueError: a line is not UTF-8, or the compressed data is damaged or truncated.
    """
    for number, line in read_lines(path):
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8: {error}") from error


@contextlib.contextmanager
def new_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path, which is renamed to `path` when the block ends without an exception.

    At any time `path` is either the old file or the complete new one. A symbolic link at `path` is replaced;
    the file that it points to is not changed.

    Raises:
      OSError: the file cannot be written; the error has a path.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)  # left over from a killed process, or a link
        yield partial
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is None:  # raised by NumPy
            raise OSError(f"{path}: {error}") from error
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Yield a binary file that replaces `path` atomically, as `new_path` does, after it is synced to disk.

    If `path` is a device or a pipe, it is written to directly.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        with open(path, "wb") as file:
            yield file
        return
    with new_path(path) as partial, open(partial, "xb") as file:  # "x" follows no link
        yield file
        file.flush()
        os.fsync(file.fileno())


def open_no_follow(path: str, flags: int) -> int:
    """Open a file like `os.open`, but fail on a symbolic link; to be used as the `opener` of `open`."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a file of UTF-8 text atomically, as in `new_file`."""
    content = text.encode()
    with new_file(path) as file:
        file.write(content)


def write_sealed_json(path: str | os.PathLike, fields: dict[str, Any]) -> None:
    """Write a JSON object together with the SHA-256 of its fields, for `read_sealed_json`."""
    write_text(path, json.dumps(fields | {"sha256": _digest(fields)}))


def read_sealed_json(path: str | os.PathLike) -> dict[str, Any]:
    """Read the fields of a file written by `write_sealed_json`.

    Raises:
      OSError: the file cannot be read.
      ValueError: the content does not match its checksum; the message names the file.
    """
    try:
        fields = dict(json.loads(Path(path).read_bytes()))
        if fields.pop("sha256", None) != _digest(fields):
            raise ValueError("the content does not match its checksum")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: {error}") from error
    return fields


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def remove(path: Path) -> None:
    """Delete a file, a link, or a directory with its content, if it exists; does not follow links."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def checksums(directory: Path, parts: Iterable[str] = ("",)) -> dict[str, str]:
    """Return the SHA-256 of every file in a directory, by its path relative to the directory.

    Args:
      directory: the directory.
      parts: names of the files and directories in it to include, by default all; missing ones are skipped.
    """
    digests = {}
    for part in parts:
        top = directory / part
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file():
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                digests[path.relative_to(directory).as_posix()] = digest
    return digests


def differing_file(directory: Path, expected: dict[str, str], parts: Iterable[str] = ("",)) -> str:
    """Describe the first file that differs from a result of `checksums`; return "" if none does."""
    return difference(expected, checksums(directory, parts))


def difference(expected: dict[str, str], actual: dict[str, str]) -> str:
    """Describe the first file that differs between two results of `checksums`; return "" if none does."""
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
    """Yield a temporary directory, which is renamed to `target` when the block ends without an exception.

    A reader therefore never sees an incomplete `target`. If another process has created `target` in the
    meantime, its directory is kept and the temporary directory is deleted.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as scratch:
        # A subdirectory is used because only its owner can read a TemporaryDirectory.
        directory = Path(scratch) / target.name
        directory.mkdir()
        yield directory
        try:
            directory.rename(target)
        except OSError:
            if not target.is_dir():
                raise
