"""Tests of all readers on the corpus of `fuzz_readers`, and of the fuzzer itself."""

import random
import shutil

import fuzz_readers
import pytest

CASES = sorted(fuzz_readers.CORPUS.glob("*/*"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}/{case.name}")
def test_readers_on_corpus(case, tmp_path):
    error = fuzz_readers.check(case.parent.name, case.read_bytes(), case.suffix, tmp_path)
    assert bool(error) == case.name.startswith("bad"), error


def test_every_reader_has_corpus_files():
    assert {case.parent.name for case in CASES} == fuzz_readers.READERS.keys()


def test_fuzz_finds_contract_violations(tmp_path, monkeypatch, capsys):
    def nameless(path):
        if b"nan" in path.read_bytes():
            raise ValueError("no name of a file")

    def foreign(path):
        if path.read_bytes().count(b"0") > 50:
            raise OverflowError

    for reader in (nameless, foreign):
        monkeypatch.setitem(fuzz_readers.READERS, reader.__name__, reader)
        shutil.copytree(fuzz_readers.CORPUS / "filter", tmp_path / "corpus" / reader.__name__)
    monkeypatch.setattr(fuzz_readers, "CORPUS", tmp_path / "corpus")
    found = fuzz_readers.fuzz(["nameless", "foreign"], random.Random(0), tmp_path, lambda n: n < 600)
    assert sorted(path.name for path in found) == ["found-0-foreign.txt", "found-1-nameless.txt"]
    assert "OverflowError" in capsys.readouterr().out
    assert b"nan" in found[1].read_bytes()
