"""Lines of plain and compressed files, and what is left of damaged ones."""

import gzip

import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from distributed_mi.data.lines import read_chunks

TEXT = b"one\ntwo\r\n\nfour"
LINES = [b"one", b"two", b"", b"four"]


def zstd(data):
    return pa.Codec("zstd").compress(data, asbytes=True)


def chunks_of(path, **options):
    return list(read_chunks(pafs.LocalFileSystem(), str(path), **options))


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("", bytes), (".gz", gzip.compress), (".zst", zstd)],
)
def test_lines_are_the_same_whatever_the_compression(tmp_path, suffix, compress):
    path = tmp_path / f"log.txt{suffix}"
    path.write_bytes(compress(TEXT))
    (chunk,) = chunks_of(path)
    assert (chunk.first_row, chunk.lines, chunk.broken) == (1, LINES, None)


def test_concatenated_gzip_members_are_read_to_the_end(tmp_path):
    path = tmp_path / "log.gz"
    path.write_bytes(gzip.compress(b"a\nb") + gzip.compress(b"c\nd\n"))
    assert chunks_of(path)[0].lines == [b"a", b"bc", b"d"]


@pytest.mark.parametrize("num_lines", [0, 1, 2, 3, 4, 7])
def test_chunks_number_their_lines_on(tmp_path, num_lines):
    path = tmp_path / "log.txt"
    path.write_bytes(b"".join(b"%d\n" % i for i in range(num_lines)))
    chunks = chunks_of(path, lines_per_chunk=2)
    assert [c.first_row for c in chunks] == list(range(1, num_lines + 1, 2))
    assert [line for c in chunks for line in c.lines] == [b"%d" % i for i in range(num_lines)]


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_everything_before_a_truncation_is_kept(tmp_path, rng, kind):
    lines = [bytes(rng.integers(97, 123, 40, dtype="uint8")) for _ in range(20_000)]
    data = b"\n".join(lines) + b"\n"
    whole = gzip.compress(data) if kind == "gz" else zstd(data)
    path = tmp_path / f"log.{kind}"
    path.write_bytes(whole[: len(whole) // 2])
    chunks = chunks_of(path)
    kept = [line for c in chunks for line in c.lines]
    assert chunks[-1].broken == "truncated"
    assert 5_000 < len(kept) < 20_000
    assert kept[:-1] == lines[: len(kept) - 1]
    assert lines[len(kept) - 1].startswith(kept[-1])


def test_damaged_gzip_names_the_damage_and_keeps_what_came_before(tmp_path, rng):
    lines = [bytes(rng.integers(97, 123, 40, dtype="uint8")) for _ in range(20_000)]
    data = bytearray(gzip.compress(b"\n".join(lines)))
    data[len(data) // 2 : len(data) // 2 + 64] = b"\xff" * 64
    path = tmp_path / "log.gz"
    path.write_bytes(bytes(data))
    chunks = chunks_of(path)
    kept = [line for c in chunks for line in c.lines]
    assert chunks[-1].broken.startswith("damaged compression")
    assert kept[:5_000] == lines[:5_000]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(b"\xef\xbb\xbfuser,item\n")
    assert chunks_of(path)[0].lines == [b"user,item"]
