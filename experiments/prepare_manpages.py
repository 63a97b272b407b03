r"""Build an extreme classification data set from manual pages.

A point is a manual page, its text is the page without the section SEE ALSO, and its labels are the pages that
this section references:

  python -m experiments.prepare_manpages --out=data/manpages

uses the pages of some Debian packages (--packages), in the versions that apt offers. The packages are
downloaded, not installed, and their pages are typeset by mandoc, which is downloaded as well. Needs apt and
dpkg, but not root; apt's own lists and the installed packages are neither used nor changed. Equal versions of
the packages always give identical files.
"""

import collections
import concurrent.futures
import gzip
import io
import re
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from absl import flags

from sparse_xmc.cli import program
from sparse_xmc.data import files

from . import prepare_packages
from .prepare_packages import Point, run

# Small packages of Debian 12 with many pages that have references.
PACKAGES = """
aircrack-ng allegro4-doc allegro5-doc amanda-common argus-client babeltrace2 binutils-common bpfcc-tools
btrfs-progs containers-storage coreutils cryptsetup-bin cyrus-common debhelper devscripts dovecot-core
dpkg-dev drbd-utils e2fsprogs erlang-manpages flatpak freebsd-manpages freeradius-common git-buildpackage
git-man graphviz gridengine-common groff grub-common hdf4-tools heimdal-dev hmmer inn2 iproute2 libaa1-dev
libacl1-dev libarchive-dev libaudit-dev libbsd-dev libcap-ng-dev libcdk5-dev libcmap-dev libcpg-dev
libcurl4-doc libfabric-dev libfuntools-dev libibverbs-dev libkeyutils-dev libldap-dev libmemcached-dev
libmodbus-dev libmotif-dev libnbd-dev libopts25-dev libowfat-dev libpam-modules libpam0g-dev libpcap0.8-dev
libpcp-pmda3-dev libpcp3-dev libradcli-dev librdmacm-dev libsane-common libsasl2-dev libselinux1-dev
libssh2-1-dev libssl-doc libsystemd-dev libtiff-dev libtiff-tools libtirpc-dev libtraceevent-doc
libtracefs-doc libunwind-dev liburing-dev libvolpack1-dev libxcb-doc libxi-dev libxt-dev libxv-dev
libzmq3-dev lintian lttng-tools lvm2 lxc manpages manpages-dev mpich-doc nbdkit ncbi-tools-bin ncurses-doc
ndctl netpbm nfs-common nmh nut-server ocfs2-tools openafs-client openafs-fileserver openbabel openmpi-doc
passwd pcp postfix psutils pvm-dev rpm samtools selinux-utils sg3-utils shorewall slapd slony1-2-bin
slurm-client snmp squid systemd tcl8.6-doc tcllib tk8.6-doc tpm2-tools trace-cmd util-linux varnish
wireshark-common x11-apps x11-utils xfsprogs xscreensaver-data-extra xscreensaver-gl xymon
"""

_RENDERER = "mandoc"
_PAGE_FILE = re.compile(r"\./usr/share/man/man\w+/([^/]+\.[1-9nl]\w*?)(\.gz)?")
_COPYRIGHT_FILE = re.compile(r"\./usr/share/doc/([^/]+)/copyright")
_INCLUSION = re.compile(rb"\.so\s+(\S+)\s*")
_OVERSTRIKE = re.compile(".\b")
_SEE_ALSO = re.compile(r"(\S+ )*see also:?( \S+)*|\s+see also:?", re.IGNORECASE)
_REFERENCE = re.compile(r"([\w.][\w.:+@-]*) ?\(([1-9nl])\w*\)", re.ASCII)

_README = """# Manual pages as an extreme classification data set

Each point is a manual page, and the task is to predict the pages that its section SEE ALSO names. The text is
the page without that section and without header and footer, typeset by mandoc and put on one line. A label is
a name with the first character of its section: `BIO_new(3)` for a reference to BIO_new(3ssl). A page is
not a label of itself, and neither are its other names. Pages with equal text are one point.

The pages are those of the Debian packages that `statistics.json` lists with their versions. Each package's
own licences apply to its pages: see `copyright/`.
"""


def download(packages: Iterable[str], directory: Path) -> dict[str, str]:
    """Download packages as NAME_VERSION_ARCHITECTURE.deb; return the versions of all known packages."""
    options = prepare_packages.update_apt(directory / "apt")
    known = run("apt-cache", *options, "show", "--no-all-versions", *packages).decode()
    versions = {stanza["Package"]: stanza["Version"] for stanza in prepare_packages.read_stanzas(known)}
    run("apt-get", *options, "download", *versions, cwd=directory)
    return versions


def read_pages(tar: tarfile.TarFile) -> tuple[dict[str, bytes], dict[str, str], dict[str, bytes]]:
    """Read the English manual pages of a package.

    Returns:
      The sources of the pages, keyed by file name, such as `printf.3`; for each file that is a link, or only
      includes another file, the name of the other file; and the copyright files, keyed by package.
    """
    pages, aliases, copyrights = {}, {}, {}
    for member in tar:
        page, licence = (form.fullmatch(member.name) for form in (_PAGE_FILE, _COPYRIGHT_FILE))
        if page and (member.issym() or member.islnk()):
            aliases[page[1]] = Path(member.linkname).name.removesuffix(".gz")
        elif page and member.isfile():
            source = _content(tar, member)
            source = gzip.decompress(source) if page[2] else source
            if inclusion := _INCLUSION.fullmatch(source):
                aliases[page[1]] = Path(inclusion[1].decode()).name
            else:
                pages[page[1]] = source
        elif licence and member.isfile():
            copyrights[licence[1]] = _content(tar, member)
    return pages, aliases, copyrights


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # true for every regular file
    return file.read()


def parse(page: str) -> tuple[str, set[str]]:
    """Return the text of a page on one line, and the pages referenced in its section SEE ALSO.

    Args:
      page: a page typeset by mandoc for a terminal: between header and footer, headings begin in the first
        column, and hardly any other line does.
    """
    lines: dict[bool, list[str]] = {False: [], True: []}
    in_see_also = False
    for line in _OVERSTRIKE.sub("", page).strip("\n").split("\n")[1:-1]:
        if _SEE_ALSO.fullmatch(line):
            in_see_also = True
        elif line and not line[0].isspace():
            in_see_also = False
        lines[in_see_also].append(line)
    # mandoc breaks long lines at hyphens, too.
    text, see_also = (re.sub(r"(?<=\w)-\n +(?=\w)", "-", "\n".join(part)) for part in lines.values())
    # Drop borders of tables.
    words = [word for word in text.split() if len(word) < 4 or re.search(r"[^\W_]", word)]
    return " ".join(words), {f"{name}({section})" for name, section in _REFERENCE.findall(see_also)}


def build(pages: dict[str, str], aliases: dict[str, str]) -> list[Point]:
    """Return the points with at least one label, sorted by text.

    Args:
      pages: the pages typeset by mandoc, keyed by file name.
      aliases: the second result of `read_pages`.
    """
    names: dict[str, set[str]] = collections.defaultdict(set)
    for alias, target in [*((file, file) for file in pages), *aliases.items()]:
        name, _, section = alias.rpartition(".")
        names[aliases.get(target, target)].add(f"{name}({section[0]})")
    labels: dict[str, set[str]] = collections.defaultdict(set)
    own_names: dict[str, set[str]] = collections.defaultdict(set)
    for file, page in pages.items():
        text, references = parse(page)
        labels[text] |= references
        own_names[text] |= names[file]
    points = [Point(sorted(labels[text] - own_names[text]), text) for text in sorted(labels)]
    return [point for point in points if point.labels]


def prepare(out: str | Path, seed: int, packages: Iterable[str]) -> None:
    """Download the packages, and write the data set to `out` atomically.

    Packages that apt does not know are skipped with a message.
    """
    packages = set(packages)
    pages: dict[str, bytes] = {}
    aliases: dict[str, str] = {}
    copyrights: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as scratch, concurrent.futures.ThreadPoolExecutor() as pool:
        directory = Path(scratch)
        versions = download(packages | {_RENDERER}, directory)
        if _RENDERER not in versions:
            raise RuntimeError(f"apt knows no package {_RENDERER}, which typesets the pages")
        if missing := packages - versions.keys():
            print(f"skipped packages that apt does not know: {', '.join(sorted(missing))}", file=sys.stderr)
        for deb in sorted(directory.glob("*.deb")):
            with tarfile.open(fileobj=io.BytesIO(run("dpkg-deb", "--fsys-tarfile", deb))) as tar:
                found = read_pages(tar)
            # Of pages with equal names, the page of the alphabetically first package is kept.
            pages, aliases, copyrights = found[0] | pages, found[1] | aliases, found[2] | copyrights
        run("dpkg-deb", "--extract", next(directory.glob(f"{_RENDERER}_*.deb")), directory / _RENDERER)
        command = (directory / _RENDERER / "usr/bin/mandoc", "-Tutf8", "-Owidth=1000")
        typeset = pool.map(lambda source: run(*command, stdin=source).decode(), pages.values())
        points = build(dict(zip(pages, typeset, strict=True)), aliases)
    with files.new_directory(out) as directory:
        prepare_packages.write(directory, points, seed, versions, _README)
        (directory / "copyright").mkdir()
        for name, content in copyrights.items():
            (directory / "copyright" / name).write_bytes(content)


def main():
    """Check the flags, and write the data set."""
    values = flags.FLAGS
    prepare_packages.check_out(values.out)
    prepare(values.out, values.seed, values.packages)


if __name__ == "__main__":
    prepare_packages.define_flags()
    flags.DEFINE_list("packages", PACKAGES.split(), "Debian packages whose manual pages are used.")
    program.start(main)
