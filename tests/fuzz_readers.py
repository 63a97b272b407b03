"""Give damaged files to all readers: each must return valid data, or raise a ValueError that names the file.

    python -m tests.fuzz_readers --seconds=60

The files in `corpus/READER` are mutated at random. If a mutated file makes the readers execute two lines one
after the other for the first time, it is mutated further. Files that violate the contract are stored in a
directory, whose path is printed. The directory also contains the last file that was read, in case a reader
kills the process, takes more than 10 s, or takes more than 1 GiB of memory.
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
_SECONDS_PER_FILE, _MAX_EXTRA_MEMORY, _MAX_FILE_BYTES, _MAX_KEPT_BYTES = 10, 1 << 30, 1 << 17, 1 << 12

# ---- readers: each reads a file and checks the result; its name is that of a directory in corpus/ ----


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
    label_names, documents = data.read_tsv(path)
    assert len(label_names) == len(documents)
    with expect_link_replaced(path.with_name("again.tsv")):
        data.write_tsv(path.with_name("again.tsv"), label_names, documents)
    assert data.read_tsv(path.with_name("again.tsv")) == (label_names, documents)


def features(path):
    path.with_name("labels.txt").write_text("3 2\n0\n\n1\n")
    dataset = data.read_dense(path, path.with_name("labels.txt"))
    assert dataset.features.shape[0] == 3
    assert np.isfinite(dataset.features).all()


def cache(path):
    """Overwrite the cache file that the first byte selects with the other bytes; the data must not change."""
    source, directory = path.with_name("source.txt"), path.with_name("cache")
    source.write_text("2 3 2\n0 1:2\n1 0:1 2:3\n")
    data.read_xmc_text(source, directory)
    selector, *content = path.read_bytes() or b"\0"
    cache_files = sorted(file for file in directory.rglob("*") if file.is_file())
    cache_files[selector % len(cache_files)].write_bytes(bytes(content))
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
    label_rows, titles = prepare.read_json(path)
    assert len(label_rows) == len(titles)
    assert all(type(label) is int for row in label_rows for label in row)
    data.write_tsv(path.with_name("raw.tsv"), [list(map(str, row)) for row in label_rows], titles)


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
    with expect_link_replaced(path.with_name("again.json")):
        files.write_sealed_json(path.with_name("again.json"), fields)
    assert files.read_sealed_json(path.with_name("again.json")) == fields


def settings(path):
    config, rows = saving.read_config(path)
    assert rows is None or rows >= config.num_labels > 0
    assert type(config).from_json(json.loads(json.dumps(config.to_json()))) == config


def statistics(path):
    found = LabelStatistics.load(path)
    assert len(found.groups) == len(found.inv_propensities)
    with expect_link_replaced(path.with_name("again.npz")):
        found.save(path.with_name("again.npz"))
    again = LabelStatistics.load(path.with_name("again.npz"))
    np.testing.assert_array_equal(again.inv_propensities, found.inv_propensities)


def calibration(path):
    found = Calibration.load(path)
    assert ((found(np.linspace(-2, 2, 9)) >= 0) & (found(np.linspace(-2, 2, 9)) <= 1)).all()


@contextlib.contextmanager
def expect_link_replaced(path):
    """Put a symbolic link at `path`, which the block must replace without writing to the link's target."""
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
_LINE_READERS = ("points", "labels", "filter", "texts", "names", "raw")  # their errors state the line
_DIRECTORY_READERS = ("modules", "model")  # their errors may name the directory instead of the file


def check_csr(matrix):
    assert matrix.indptr[0] == 0
    assert (np.diff(matrix.indptr) >= 0).all()
    assert matrix.indptr[-1] == len(matrix.indices) == len(matrix.data)
    assert ((matrix.indices >= 0) & (matrix.indices < matrix.shape[1])).all()
    assert np.isfinite(matrix.data).all()
    assert matrix.has_canonical_format


def check(reader: str, content: bytes, suffix: str, directory: Path) -> str | None:
    """Read `content` as a file; return None if it is valid, otherwise the message of the ValueError.

    Raises:
      Exception: the reader violates the contract; any type.
    """
    path = directory / f"{reader}{suffix}"
    path.write_bytes(content)
    try:
        READERS[reader](path)
    except ValueError as error:
        where = re.escape(str(directory if reader in _DIRECTORY_READERS else path))
        form = where + (r":\d+: .+" if reader in _LINE_READERS else "[/: ].+")
        if not re.fullmatch(form, str(error)):
            raise AssertionError(f"expected one line that begins with the file's name: {error}") from error
        return str(error)
    return None


# ---- mutations ----

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


def mutate(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Return the content after 1 to 5 random mutations.

    A mutation flips bits, replaces bytes, numbers or words by special ones, or deletes, inserts, repeats or
    copies a part of this file or of the other files.
    """
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
                part = part * min(rng.choice((2, 3, 10, 100, 10_000)), 1 + _MAX_FILE_BYTES // (1 + len(part)))
            case 5:
                part = content[end:] if rng.random() < 0.5 else other[: rng.randrange(len(other) + 1)]
            case 6:
                part, end = other[rng.randrange(len(other) + 1) :], len(content)
            case 7 if word := _WORD.search(content, start):
                (start, end), part = word.span(), token
        content = (content[:start] + part + content[end:])[:_MAX_FILE_BYTES]
    return content


# ---- fuzzing ----

_SOURCE_DIRECTORIES = tuple(
    str(Path(module.__file__).parent) for module in (data, pretrained_files, prepare, saving)
)


def executed_line_pairs(run: Callable[[], object]) -> set:
    """Call `run`; return all pairs of source lines that were executed one after the other."""
    pairs, previous = set(), None

    def trace_line(frame, event, argument):
        nonlocal previous
        current = (frame.f_code, frame.f_lineno)
        pairs.add((previous, current))
        previous = current
        return trace_line

    sys.settrace(
        lambda frame, *_: trace_line if frame.f_code.co_filename.startswith(_SOURCE_DIRECTORIES) else None
    )
    try:
        run()
        return pairs
    finally:
        sys.settrace(None)


def fuzz(
    readers: list[str], rng: random.Random, directory: Path, should_continue: Callable[[int], bool]
) -> list[Path]:
    """Read mutated files; return the paths of those that violate the contract.

    Args:
      readers: names of readers, which take turns.
      rng: source of the mutations.
      directory: where files are written.
      should_continue: function of the number of files read so far.
    """
    seen, findings, num_files = set(), {}, 0
    pools = {
        reader: [(file.read_bytes(), file.suffix) for file in sorted((CORPUS / reader).iterdir())]
        for reader in readers
    }
    while should_continue(num_files):
        reader = readers[num_files % len(readers)]
        num_files += 1
        pool = pools[reader]
        content, suffix = rng.choice(pool)
        content = mutate(content, [other for other, _ in pool], rng)
        faulthandler.dump_traceback_later(_SECONDS_PER_FILE, exit=True, file=sys.__stderr__)
        try:
            new = executed_line_pairs(lambda: check(reader, content, suffix, directory))  # noqa: B023
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a Rust panic is not an Exception
            where = traceback.extract_tb(error.__traceback__)[-1]
            kind = (reader, type(error), where.filename, where.lineno)
            if kind not in findings:
                findings[kind] = directory / f"found-{len(findings)}-{reader}{suffix}"
                findings[kind].write_bytes(content)
                print(f"{findings[kind]}: {type(error).__name__}: {str(error)[:500]}", flush=True)
            continue
        finally:
            faulthandler.cancel_dump_traceback_later()
        if not new <= seen and len(content) <= _MAX_KEPT_BYTES:
            seen |= new
            pool.append((content, suffix))
    sizes = ", ".join(f"{reader} {len(pool)}" for reader, pool in pools.items())
    print(f"{num_files:,} files read; corpus size, with mutations that executed new pairs of lines: {sizes}")
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
    with contextlib.suppress(FileNotFoundError):  # without /proc, memory is not limited
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + _MAX_EXTRA_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    directory = Path(tempfile.mkdtemp(prefix="fuzz-[1]-"))
    print(f"files in {directory}", flush=True)
    end = time.monotonic() + flags.seconds
    found = fuzz(flags.readers, random.Random(flags.seed), directory, lambda _: time.monotonic() < end)
    if found:
        sys.exit(f"{len(found)} findings in {directory}")
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
