"""The checksum against published values; the file is read by TensorBoard."""

import random
import sys

import pytest

from tlens_callback.sinks.event_file import EventFile, find_crc32c


@pytest.fixture(params=["google_crc32c", "tensorboard"])
def package(request, monkeypatch):
    """The package that computes the checksums."""
    pytest.importorskip(request.param)
    if request.param == "tensorboard":
        monkeypatch.setitem(sys.modules, "google_crc32c", None)
    return request.param


@pytest.mark.parametrize(
    ("text", "sum_"),
    [
        # RFC 3720, appendix B.4, and the check value of the catalogue of CRCs.
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
        (b"123456789", 0xE3069283),
        (b"", 0),
        (b"a", 0xC1D04330),
    ],
)
def test_published_checksums(package, text, sum_):
    crc32c = find_crc32c()
    assert crc32c.__module__.startswith(package)
    assert crc32c(text) == sum_


def test_tensorboard_reads_it(tmp_path, package):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    records = [b"", b"a", random.Random(1).randbytes(100_000)]
    file = EventFile(tmp_path / "a" / "b")
    file.add(records[:2])
    file.add(records[2:])
    (path,) = tmp_path.rglob("events.out.tfevents.*")
    assert list(loader.RawEventFileLoader(str(path)).Load()) == records
    file.close()
    broken = bytearray(path.read_bytes())
    broken[-10] ^= 1
    path.write_bytes(broken)
    assert list(loader.RawEventFileLoader(str(path)).Load()) == records[:2]


def test_files_are_named_in_their_order(tmp_path):
    for _ in range(12):
        EventFile(tmp_path).close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 12
    assert [f.stat().st_ino for f in sorted(files, key=lambda f: int(f.name.split(".")[-1]))] == [
        f.stat().st_ino for f in files
    ]
