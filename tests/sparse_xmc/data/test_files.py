import errno
import os

import numpy as np
import pytest
import scipy.sparse

from sparse_xmc import data
from sparse_xmc.data import files

WRITERS = {
    "write_text": lambda path: files.write_text(path, "new"),
    "write_sealed_json": lambda path: files.write_sealed_json(path, {"a": 1}),
    "write_tsv": lambda path: data.write_tsv(path, [["label"]], ["text"]),
    "LabelEncoder": lambda path: data.LabelEncoder(["label"]).save(path),
    "TextEncoder": lambda path: data.TextEncoder(["word"], np.ones(1)).save(path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_symlinks_are_replaced_not_followed(tmp_path, writer):
    outside, path = tmp_path / "outside", tmp_path / "file"
    outside.write_text("mine")
    for name in ("file", ".file.partial"):
        (tmp_path / name).symlink_to(outside)
    WRITERS[writer](path)
    assert outside.read_text() == "mine"
    assert not path.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["file", "outside"]


def test_save_csr_does_not_follow_symlinks(tmp_path):
    outside, directory = tmp_path / "outside", tmp_path / "matrix"
    outside.write_text("mine")
    directory.mkdir()
    for name in ("data.npy", "indices.npy", ".indptr.npy.partial", "shape.json", "checksums.json"):
        (directory / name).symlink_to(outside)
    matrix = scipy.sparse.csr_array(np.eye(3, dtype=np.float32))
    data.save_csr(directory, matrix)
    assert outside.read_text() == "mine"
    assert (data.load_csr(directory) != matrix).nnz == 0


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            r"No space left on device: '\S+/file'",
        ),
        (OSError("10 requested and 0 written"), r"\S+/file: 10 requested and 0 written"),
        (KeyboardInterrupt("of the user"), "of the user"),
    ],
)
def test_failed_write_keeps_existing_file(tmp_path, error, message):
    path = tmp_path / "file"
    path.write_text("old")

    def write():
        with files.new_file(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(type(error), match=message):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_write_text_to_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    files.write_text(tmp_path / "pipe", "text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)
    assert os.listdir(tmp_path) == ["pipe"]


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"sha256": "0"}', b"[" * 20_000, b"\xff"])
def test_sealed_json_round_trips_and_raises_if_damaged(tmp_path, content):
    path = tmp_path / "file.json"
    fields = {"name": "ü", "values": [1, 2.5, None], "nested": {"b": 1, "a": 2}}
    files.write_sealed_json(path, fields)
    assert files.read_sealed_json(path) == fields
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.json: damaged: "):
        files.read_sealed_json(path)
