"""The checksum against published values and TensorBoard's own; the file is read by TensorBoard."""

import random
import time

import pytest

from tlens_callback.sinks.event_file import EventFile, crc32c


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
def test_published_checksums(text, sum_):
    assert crc32c(text) == sum_


def test_the_same_as_tensorboards():
    stub = pytest.importorskip("tensorboard.compat.tensorflow_stub.pywrap_tensorflow")
    rng = random.Random(0)
    for size in [*range(0, 20), 255, 256, 257, 511, 512, 513, 1000, 4096, 10_001]:
        text = rng.randbytes(size)
        assert crc32c(text) == stub.crc32c(text)


def test_a_megabyte_is_much_cheaper_than_byte_by_byte():
    stub = pytest.importorskip("tensorboard.compat.tensorflow_stub.pywrap_tensorflow")

    def seconds(checksum, text):
        begin = time.thread_time()
        checksum(text)
        return time.thread_time() - begin

    text = random.Random(0).randbytes(1_000_000)
    ours = min(seconds(crc32c, text) for _ in range(3))
    assert 5 * ours < 10 * seconds(stub.crc32c, text[:100_000])


def test_tensorboard_reads_it(tmp_path):
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
