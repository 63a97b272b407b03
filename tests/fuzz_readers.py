"""Gives damaged files to all readers: each returns valid data, or raises a ValueError that names the file.

    python -m tests.fuzz_readers --seconds=60

The files in `corpus/READER` are changed at random; one that makes our code run two lines in a row that never
were is changed further. What is found is kept in a directory that is printed, with the
file of the moment, should a reader kill the process, take more than 10 s, or more than 1 GiB of memory.
"""

import argparse
import contextlib
import faulthandler
import json
import logging
import random
import re
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments import prepare
from sparse_xmc import data, saving
from sparse_xmc.calibration import Calibration
from sparse_xmc.data import files
from sparse_xmc.data.tokens import Tokenizer
from sparse_xmc.encoders import pretrained_files
from sparse_xmc.metrics import LabelStatistics

CORPUS = Path(__file__).with_name("corpus")
_SECONDS_PER_FILE, _MORE_MEMORY, _LARGEST_FILE, _LARGEST_KEPT = 10, 1 << 30, 1 << 17, 1 << 12

# ---- the readers, by the name of their file, and what holds of all that they return ----


def points(path):
    dataset = data.read_xmc_text(path)
    check_csr(dataset.features)
    check_csr(dataset.labels)


def labels(path):
    check_csr(data.read_xmc_labels(path))


def filter(path):
    check_csr(data.read_filter(path, num_points=3))
    check_csr(data.read_filter(path, num_points=3, num_labels=5))


def texts(path):
    names, contents = data.read_tsv(path)
    assert len(names) == len(contents)
    with link(path.with_name("again.tsv")):
        data.write_tsv(path.with_name("again.tsv"), names, contents)
    assert data.read_tsv(path.with_name("again.tsv")) == (names, contents)


def features(path):
    path.with_name("labels.txt").write_text("3 2\n0\n\n1\n")
    dataset = data.read_dense(path, path.with_name("labels.txt"))
    assert dataset.features.shape[0] == 3
    assert np.isfinite(dataset.features).all()


def cache(path):
    """The first byte says which file of a cache the others are written to; what is read stays the same."""
    source, directory = path.with_name("source.txt"), path.with_name("cache")
    source.write_text("2 3 2\n0 1:2\n1 0:1 2:3\n")
    data.read_xmc_text(source, directory)
    number, *content = path.read_bytes() or b"\0"
    damaged = sorted(file for file in directory.rglob("*") if file.is_file())
    damaged[number % len(damaged)].write_bytes(bytes(content))
    dataset = data.read_xmc_text(source, directory)
    np.testing.assert_array_equal(dataset.features.toarray(), [[0, 2, 0], [1, 0, 3]])
    np.testing.assert_array_equal(dataset.labels.toarray(), [[1, 0], [0, 1]])
    shutil.rmtree(directory)


def words(path):
    encoder = data.TextEncoder.load(path)
    check_csr(encoder(["a b", "c"]))


def names(path):
    encoder = data.LabelEncoder.load(path)
    assert encoder([[name] for name in encoder.names]).nnz == len(encoder.names) == len(set(encoder.names))


def raw(path):
    labels, titles = prepare.read_json(path)
    assert len(labels) == len(titles)
    assert all(type(label) is int for row in labels for label in row)
    data.write_tsv(path.with_name("raw.tsv"), [list(map(str, row)) for row in labels], titles)


def config(path):
    assert pretrained_files.PretrainedConfig.from_file(path).max_length > 0


def modules(path):
    pooling, _ = pretrained_files.resolve_pooling(path.parent, None, None)
    assert pooling in pretrained_files.POOLINGS


def model(path):
    shapes = {"words.embedding": (5, 2), "up.kernel": (2, 3), "norm.scale": (2,), "norm.bias": (2,)}
    shapes = {f"layers.0.{name}" if name == "up.kernel" else name: s for name, s in shapes.items()}
    tiny = pretrained_files.PretrainedConfig("bert", 5, 2, 1, 1, 3, 4)
    for name, value in pretrained_files.read_parameters(path.parent, tiny, shapes).items():
        assert value.shape == shapes[name]
        assert value.dtype == np.float32
        assert np.isfinite(value).all()


def tokenizer(path):
    lists = Tokenizer.from_directory(path.parent, max_length=8)(["a dog runs", ""])
    assert lists.lengths.max() <= 8
    assert len(lists) == 2


def record(path):
    fields = files.read_sealed_json(path)
    with link(path.with_name("again.json")):
        files.write_sealed_json(path.with_name("again.json"), fields)
    assert files.read_sealed_json(path.with_name("again.json")) == fields


def settings(path):
    config, rows = saving.read_config(path)
    assert rows is None or rows >= config.num_labels > 0
    assert type(config).from_json(json.loads(json.dumps(config.to_json()))) == config


def statistics(path):
    found = LabelStatistics.load(path)
    assert len(found.groups) == len(found.inv_propensities)
    with link(path.with_name("again.npz")):
        found.save(path.with_name("again.npz"))
    again = LabelStatistics.load(path.with_name("again.npz"))
    np.testing.assert_array_equal(again.inv_propensities, found.inv_propensities)


def calibration(path):
    found = Calibration.load(path)
    assert ((found(np.linspace(-2, 2, 9)) >= 0) & (found(np.linspace(-2, 2, 9)) <= 1)).all()


@contextlib.contextmanager
def link(path):
    """A symbolic link at a path that is written meanwhile, to a file that must stay as it is."""
    target = path.with_name("not to be written")
    target.write_text("mine")
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    yield
    assert target.read_text() == "mine"
    assert not path.is_symlink()


READERS = {
    reader.__name__: reader
    for reader in (
        *(points, labels, filter, texts, features, cache, words, names, raw),
        *(config, modules, model, tokenizer),
        *(record, settings, statistics, calibration),
    )
}
_WITH_LINES = ("points", "labels", "filter", "texts", "names", "raw")  # of which errors name the line
_DIRECTORIES = ("modules", "model")  # which errors may name in place of the file


def check_csr(matrix):
    assert matrix.indptr[0] == 0
    assert (np.diff(matrix.indptr) >= 0).all()
    assert matrix.indptr[-1] == len(matrix.indices) == len(matrix.data)
    assert ((matrix.indices >= 0) & (matrix.indices < matrix.shape[1])).all()
    assert np.isfinite(matrix.data).all()
    assert matrix.has_canonical_format


def check(reader: str, content: bytes, suffix: str, directory: Path) -> str | None:
    """Has a file read: None for valid data, else the error's message. Raises what is against the contract."""
    path = directory / f"{reader}{suffix}"
    path.write_bytes(content)
    try:
        READERS[reader](path)
    except ValueError as error:
        where = re.escape(str(directory if reader in _DIRECTORIES else path))
        form = where + (r":\d+: .+" if reader in _WITH_LINES else "[/: ].+")
        if not re.fullmatch(form, str(error)):
            raise AssertionError(f"expected one line that begins with the file's name: {error}") from error
        return str(error)
    return None


# ---- changes ----

_TOKENS = [
    *b"\0 \t \r \n \xff | , : - . 0 1 [ ] { } \" ' \\".split(b" "),
    *b"-1 1.7 1e39 1e999 1e-999 nan inf NaN Infinity 2147483648 4294967296 18446744073709551616".split(),
    *(b"9" * 5000, b"null", b"true", b'"a"', b"[]", b"{}", b'"\\ud800"', b"[" * 20_000, b'{"a":' * 20_000),
    *(b"\xef\xbb\xbf", b"\xc2\xa0", b"\x1c", b"\r\n", b"\n\n", b" ", b"label\ttext\n"),
    *(b"<f8", b">f4", b"<i4", b"|O", b"<U1", b"True", b"F16", b"BF16", b"F64", b"I32", b"F8_E4M3", b"(0,)"),
    *(struct.pack("<f", value) for value in (float("nan"), float("inf"), -float("inf"))),
    *(struct.pack("<q", value) for value in (-1, 1 << 31, 1 << 62)),
]


_WORD = re.compile(rb"[\w.+-]+")


def change(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Some of: other bits, bytes, numbers and words; parts left out, put in, repeated, or of another file."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
        start, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        if rng.random() < 0.7:
            end = min(end, start + rng.choice((1, 1, 2, 4, 8, 32)))
        part, token, other = content[start:end], rng.choice(_TOKENS), rng.choice(others)
        match rng.randrange(8):
            case 0:
                part = bytes(byte ^ 1 << rng.randrange(8) for byte in part)
            case 1:
                part = b""
            case 2:
                part = part + token
            case 3:
                part, end = token, start + len(token)
            case 4:
                part = part * min(rng.choice((2, 3, 10, 100, 10_000)), 1 + _LARGEST_FILE // (1 + len(part)))
            case 5:
                part = content[end:] if rng.random() < 0.5 else other[: rng.randrange(len(other) + 1)]
            case 6:
                part, end = other[rng.randrange(len(other) + 1) :], len(content)
            case 7 if word := _WORD.search(content, start):
                (start, end), part = word.span(), token
        content = (content[:start] + part + content[end:])[:_LARGEST_FILE]
    return content


# ---- the search ----

_OURS = tuple(str(Path(module.__file__).parent) for module in (data, pretrained_files, prepare, saving))


def traced(run: Callable[[], object]) -> set:
    """Has `run` run: the pairs of lines of ours that came one after the other."""
    pairs, last = set(), None

    def line(frame, event, argument):
        nonlocal last
        here = (frame.f_code, frame.f_lineno)
        pairs.add((last, here))
        last = here
        return line

    sys.settrace(lambda frame, *_: line if frame.f_code.co_filename.startswith(_OURS) else None)
    try:
        run()
        return pairs
    finally:
        sys.settrace(None)


def fuzz(readers: list[str], rng: random.Random, directory: Path, go_on: Callable[[int], bool]) -> list[Path]:
    """Goes on for as long as it is told to, by the number of files so far; returns what was found."""
    seen, findings, number = set(), {}, 0
    pools = {
        reader: [(file.read_bytes(), file.suffix) for file in sorted((CORPUS / reader).iterdir())]
        for reader in readers
    }
    while go_on(number):
        reader = readers[number % len(readers)]
        number += 1
        pool = pools[reader]
        content, suffix = rng.choice(pool)
        content = change(content, [other for other, _ in pool], rng)
        faulthandler.dump_traceback_later(_SECONDS_PER_FILE, exit=True, file=sys.__stderr__)
        try:
            new = traced(lambda: check(reader, content, suffix, directory))  # noqa: B023
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of Rust is no Exception
            where = traceback.extract_tb(error.__traceback__)[-1]
            kind = (reader, type(error), where.filename, where.lineno)
            if kind not in findings:
                findings[kind] = directory / f"found-{len(findings)}-{reader}{suffix}"
                findings[kind].write_bytes(content)
                print(f"{findings[kind]}: {type(error).__name__}: {str(error)[:500]}", flush=True)
            continue
        finally:
            faulthandler.cancel_dump_traceback_later()
        if not new <= seen and len(content) <= _LARGEST_KEPT:
            seen |= new
            pool.append((content, suffix))
    sizes = ", ".join(f"{reader} {len(pool)}" for reader, pool in pools.items())
    print(f"{number:,} files; of lines in a new order, with the corpus: {sizes}")
    return list(findings.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    flags = parser.parse_args()
    faulthandler.enable()
    logging.disable()
    warnings.simplefilter("error")
    with contextlib.suppress(FileNotFoundError):  # where there is no /proc, memory is not bounded
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + _MORE_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    directory = Path(tempfile.mkdtemp(prefix="fuzz-[1]-"))
    print(f"files are in {directory}", flush=True)
    end = time.monotonic() + flags.seconds
    found = fuzz(flags.readers, random.Random(flags.seed), directory, lambda _: time.monotonic() < end)
    if found:
        sys.exit(f"{len(found)} findings in {directory}")
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
