"""Tests of raw-text data sets, and of published results of encoders trained on them."""

import gzip
import json
import re
from pathlib import Path

import pytest

import experiments
from experiments import prepare, published, result_tables, sweep, tables
from sparse_xmc.data import read_tsv

ROOT = Path(experiments.__file__).parents[1]


class TestPublishedRows:
    def test_rows_have_known_data_set_source_and_plausible_numbers(self):
        found = published.read_end_to_end()
        rows = [row for rows in found.values() for row in rows]
        assert len({(row["dataset"], row["system"], row["encoder"]) for row in rows}) == len(rows)
        for row in rows:
            assert row["dataset"] in prepare.DATASETS
            assert row["source"]
            assert 30 < float(row["test_p1"]) < 80
            for column in ("peak_memory_gib", "seconds_per_epoch"):
                assert not row[column] or float(row[column]) > 0
        elmo = next(row for row in found["raw_amazon-670k"] if row["system"] == "ELMO FP8")
        assert (elmo["test_p1"], elmo["peak_memory_gib"], elmo["seconds_per_epoch"]) == (
            "50.34",
            "3.55",
            "245",
        )

    def test_data_sets_match_table_file(self, monkeypatch):
        monkeypatch.chdir(ROOT)
        table = sweep.read_table("experiments/tables/end_to_end.toml")
        assert set(table.data) == published.read_end_to_end().keys()
        for entry in table.entries:
            values = sweep.effective_flags(entry.flags)
            assert values["encoder_trainable"]
            assert values["output_dtype"] == "bfloat16"
            assert values["output_optimizer"] == "sgd"
            assert values["learning_rate"] * values["encoder_lr_multiplier"] == pytest.approx(1e-5)
            assert values["max_length"] == (
                32 if "titles" in entry.data else 256 if "wiki" in entry.data else 128
            )

    def test_report_includes_published_rows(self, tmp_path, monkeypatch):
        monkeypatch.chdir(ROOT)
        table = sweep.read_table("experiments/tables/end_to_end.toml")
        tables.report(table, result_tables.read_rows(table, tmp_path), "name", tmp_path)
        text = (tmp_path / "name.md").read_text()
        assert text.count("Published results of encoders trained end to end") == len(table.data)
        assert "| ELMO FP8 | BERT-base | 50.34 | 3.55 | 245 | xmc-aalto/elmo assets/performance.png |" in text


class TestPrepare:
    @pytest.fixture
    def directory(self, tmp_path, monkeypatch):
        monkeypatch.setitem(prepare.DATASETS, "Wiki-500K", prepare.Statistics(3, 2, 4, 2.0, ("slice",)))
        (tmp_path / "train_raw_texts.txt").write_text("one\ttext\ntwo  texts\n\n")
        (tmp_path / "train_labels.txt").write_text("7 9\n9 12 9\n7 40\n")
        (tmp_path / "test_raw_texts.txt").write_text("a\nb\n")
        (tmp_path / "test_labels.txt").write_text("7\n12\n")
        return tmp_path

    def prepare(self, directory):
        return prepare.prepare("Wiki-500K", directory, (), raw_text=True)

    def test_writes_tsv_of_texts_and_labels(self, directory):
        assert self.prepare(directory) == []
        labels, texts = read_tsv(directory / "train.tsv.gz")
        assert labels == [["7", "9"], ["9", "12"], ["7", "40"]]
        assert texts == ["one text", "two texts", ""]
        for name in ("train_raw_texts.txt", "train_labels.txt"):
            (directory / name).unlink()
        assert self.prepare(directory) == []  # Existing files are checked again.

    @pytest.mark.parametrize(
        ("name", "content", "expected"),
        [
            ("train_labels.txt", "7\n9\n", r"train_labels\.txt: expected 3 points and 4 labels, got 2 and 4"),
            (
                "train_labels.txt",
                "7\n9\n7\n",
                r"train_labels\.txt: expected 2\.0 labels per point, got 1\.00",
            ),
            ("test_labels.txt", "1 2 3\n4 5\n", r"test_labels\.txt: expected 4 labels at most, got 5"),
            ("test_raw_texts.txt", "a\n", r"test_raw_texts\.txt: expected 2 lines, as .* has, got 1"),
        ],
    )
    def test_reports_malformed_files(self, directory, name, content, expected):
        (directory / name).write_text(content)
        (message,) = self.prepare(directory)
        assert re.search(expected, message), message
        assert not list(directory.glob(".partial-*"))

    def test_reports_missing_required_files(self, directory):
        files = [name for name, _ in prepare.required_files("Wiki-500K", (), raw_text=True)]
        assert files == ["train_raw_texts.txt", "train_labels.txt", "test_raw_texts.txt", "test_labels.txt"]
        for name in files:
            (directory / name).unlink()
        messages = self.prepare(directory)
        assert messages == [f"{directory / f'{split}_raw_texts.txt'}: missing" for split in ("train", "test")]

    def test_read_json_reads_only_titles(self, tmp_path):
        point = {"title": "a title", "content": "much more", "target_ind": [0]}
        with gzip.open(tmp_path / "trn.json.gz", "wt") as file:
            file.write(json.dumps(point) + "\n")
        assert prepare.read_json(tmp_path / "trn.json.gz", titles=True) == ([[0]], ["a title"])
        assert prepare.read_json(tmp_path / "trn.json.gz") == ([[0]], ["a title much more"])
        assert [name for name, s in prepare.DATASETS.items() if s.titles] == [
            name for name in prepare.DATASETS if "Titles" in name
        ]


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("sparse_xmc/cli/flags/data/raw_*.cfg")), ids=lambda p: p.stem
)
def test_raw_text_flagfiles_name_prepared_files(path):
    directory = path.stem.removeprefix("raw_")
    assert directory in {name.lower() for name in prepare.DATASETS}
    files = re.findall(r"^--\w+=(data/.*)$", path.read_text(), re.MULTILINE)
    assert files == [f"data/{directory}/{split}.tsv.gz" for split in ("train", "test")]
