import gzip
import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile

import pytest

from experiments import prepare_manpages
from experiments.prepare_packages import Point
from sparse_xmc.data import read_tsv

ROOT = pathlib.Path(prepare_manpages.__file__).parents[1]
MAN = "./usr/share/man"


def bold(text):
    return "".join(f"{character}\b{character}" for character in text)


def page(*lines):
    return "\n".join(("DOG(1)    Pets    DOG(1)", "", *lines, "", "Debian    2020    DOG(1)", ""))


DOG = page(
    bold("NAME"),
    f"     {bold('dog')} - a _\bp_\be_\bt",
    "",
    bold("SEE ALSO"),
    f"     {bold('cat')}(1), {bold('fish')} (3), BIRD::Canary(3pm), dog(1), well-",
    "     known(7)",
    "",
    "     The Book of Dogs, 2nd edition (second).",
    "",
    bold("AUTHORS"),
    "     wolf(8), well-",
    "     known.",
    "     ┌────────┐",
    "     _________________ - -- x",
)


def make_tar(files):
    """Return a tar archive of files, given as contents by name; a str is the target of a symbolic link."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                tar.addfile(member)
            else:
                member.size, member.mode = len(content), 0o755
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def read_pages(files):
    with tarfile.open(fileobj=io.BytesIO(make_tar(files))) as tar:
        return prepare_manpages.read_pages(tar)


class TestReadPages:
    def test_reads_english_pages(self):
        pages, aliases, copyrights = read_pages(
            {
                f"{MAN}/man1/dog.1.gz": gzip.compress(b".TH DOG"),
                f"{MAN}/man3/Pet::Dog.3pm": b".TH Pet",
                f"{MAN}/mann/dog.n.gz": gzip.compress(b".TH dog"),
                f"{MAN}/de/man1/dog.1.gz": gzip.compress(b".TH HUND"),
                f"{MAN}/man1/README": b"no page",
                "./usr/bin/dog.1": b"no page",
                "./usr/share/doc/dog/copyright": b"free",
                "./usr/share/doc/dog/changelog": b"new",
            }
        )
        assert pages == {"dog.1": b".TH DOG", "Pet::Dog.3pm": b".TH Pet", "dog.n": b".TH dog"}
        assert aliases == {}
        assert copyrights == {"dog": b"free"}

    def test_links_and_inclusions(self):
        pages, aliases, copyrights = read_pages(
            {
                f"{MAN}/man1/puppy.1.gz": "dog.1.gz",
                f"{MAN}/man8/hound.8": "../man1/dog.1",
                f"{MAN}/man1/whelp.1.gz": gzip.compress(b".so man1/dog.1\n"),
                f"{MAN}/man1/wolf.1": b".TH WOLF\n.so man1/dog.1\n",
                "./usr/share/doc/dog/copyright": "../pets/copyright",
            }
        )
        assert pages == {"wolf.1": b".TH WOLF\n.so man1/dog.1\n"}
        assert aliases == dict.fromkeys(("puppy.1", "hound.8", "whelp.1"), "dog.1")
        assert copyrights == {}

    def test_raises_for_damaged_page(self):
        with pytest.raises(gzip.BadGzipFile):
            read_pages({f"{MAN}/man1/dog.1.gz": b".TH DOG"})


class TestParse:
    def test_text_and_references(self):
        assert prepare_manpages.parse(DOG) == (
            "NAME dog - a pet AUTHORS wolf(8), well-known. - -- x",
            {"cat(1)", "fish(3)", "BIRD::Canary(3)", "dog(1)", "well-known(7)"},
        )

    @pytest.mark.parametrize(
        "heading", ["SEE ALSO", "See also:", "UNIX SEE ALSO", "SEE ALSO FOR PETS", "   See Also"]
    )
    def test_recognizes_see_also_headings(self, heading):
        text = page("NAME", "     dog", heading, "     cat(1)", "BUGS", "     fleas(1)")
        assert prepare_manpages.parse(text) == ("NAME dog BUGS fleas(1)", {"cat(1)"})

    @pytest.mark.parametrize("line", ["     For more, see also", "     see also cat(1)", "SEEALSO"])
    def test_ignores_lines_that_are_not_headings(self, line):
        text, references = prepare_manpages.parse(page("NAME", line, "     fish(1)"))
        assert text == f"NAME {line.strip()} fish(1)"
        assert references == set()

    @pytest.mark.parametrize("page", ["", "one line", "header\nfooter\n"])
    def test_empty_page(self, page):
        assert prepare_manpages.parse(page) == ("", set())


class TestBuild:
    def test_labels_are_references(self):
        pages = {
            "wolf.8": page("NAME", "     wolf", "SEE ALSO", "     dog(1)"),
            "dog.1": page("NAME", "     dog", "SEE ALSO", "     wolf(8), dog(1), cat(1)"),
            "fish.3pets": page("NAME", "     fish"),
        }
        assert prepare_manpages.build(pages, {}) == [
            Point(["cat(1)", "wolf(8)"], "NAME dog"),
            Point(["dog(1)"], "NAME wolf"),
        ]

    def test_excludes_own_names_from_labels(self):
        text = page("NAME", "     dog", "SEE ALSO", "     dog(1), dog(3), puppy(1), whelp(1), cat(1)")
        aliases = {"puppy.1": "dog.1", "whelp.1": "puppy.1", "cat.1": "lion.1"}
        assert prepare_manpages.build({"dog.1": text}, aliases) == [Point(["cat(1)", "dog(3)"], "NAME dog")]

    def test_merges_pages_with_equal_text(self):
        pages = {
            "dog.1": page("NAME", "     dog", "SEE ALSO", "     hound(8), cat(1)"),
            "hound.8x": page("NAME", "     dog", "SEE ALSO", "     dog(1), fish(3x)"),
        }
        assert prepare_manpages.build(pages, {}) == [Point(["cat(1)", "fish(3)"], "NAME dog")]

    def test_drops_page_that_references_only_itself(self):
        assert prepare_manpages.build({"dog.1": page("NAME", "SEE ALSO", "     dog(1)")}, {}) == []


def write_program(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A directory of packages, which are tar archives, and fake programs apt-get, apt-cache and dpkg-deb."""
    registry = tmp_path / "registry"
    pages = {f"p{i}": f"NAME\n p{i}\nSEE ALSO\n all(7), rare{i}(1)\n".encode() for i in range(20)}
    contents = {
        "mandoc": {"./usr/bin/mandoc": b"#!/bin/sh\necho header; cat; echo footer\n"},
        "pets": {f"{MAN}/man1/{name}.1": text for name, text in pages.items()}
        | {f"{MAN}/man1/p99.1": "p0.1", "./usr/share/doc/pets/copyright": b"free"},
        "zoo": {f"{MAN}/man1/p0.1": b"NAME\n another\nSEE ALSO\n all(7)\n"},
    }
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    registry.mkdir()
    for name, files in contents.items():
        (registry / f"{name}_1%3a2_all.deb").write_bytes(make_tar(files))
        (registry / f"{name}.stanza").write_text(f"Package: {name}\nVersion: 1:2\n\n")
    write_program(tmp_path / "bin" / "apt-get", f'case "$*" in *download*) cp {registry}/*.deb .;; esac')
    write_program(tmp_path / "bin" / "apt-cache", f"cat {registry}/*.stanza")
    write_program(
        tmp_path / "bin" / "dpkg-deb",
        'if [ "$1" = --extract ]; then mkdir "$3"; tar -xf "$2" -C "$3"; else cat "$2"; fi',
    )
    return registry


class TestProgram:
    def test_writes_data_set(self, tmp_path, registry):
        command = [sys.executable, "-m", "experiments.prepare_manpages", f"--out={tmp_path / 'out'}"]
        command.append("--packages=pets,zoo,unicorn,griffin")
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "skipped packages that apt does not know: griffin, unicorn\n" in result.stderr
        out = tmp_path / "out"
        parts = {name: read_tsv(out / f"{name}.tsv.gz") for name in ("train", "test")}
        texts = [text for _, texts in parts.values() for text in texts]
        assert sorted(texts) == sorted(f"NAME p{i}" for i in range(20))  # p0 comes from pets, not from zoo
        assert all(labels == [["all(7)"]] * len(labels) for labels, _ in parts.values())
        statistics = json.loads((out / "statistics.json").read_text())
        assert statistics["packages"] == {"mandoc": "1:2", "pets": "1:2", "zoo": "1:2"}
        assert (out / "copyright" / "pets").read_bytes() == b"free"
        assert result.stdout in (out / "README.md").read_text()

    def test_raises_without_mandoc(self, tmp_path, registry):
        (registry / "mandoc.stanza").unlink()
        with pytest.raises(RuntimeError, match="apt knows no package mandoc, which typesets the pages"):
            prepare_manpages.prepare(tmp_path / "out", 0, ["pets"])

    def test_raises_for_failed_download(self, tmp_path, registry):
        write_program(
            tmp_path / "bin" / "apt-get", 'case "$*" in *download*) echo disk full; exit 100;; esac'
        )
        with pytest.raises(RuntimeError, match="exit status 100: disk full"):
            prepare_manpages.prepare(tmp_path / "out", 0, ["pets"])

    def test_raises_for_damaged_package(self, tmp_path, registry):
        (registry / "pets_1%3a2_all.deb").write_bytes(b"no tar")
        with pytest.raises(tarfile.ReadError):
            prepare_manpages.prepare(tmp_path / "out", 0, ["pets"])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "registry"]

    def test_default_packages_are_distinct(self):
        names = prepare_manpages.PACKAGES.split()
        assert names == sorted(set(names))
        assert "manpages-dev" in names
