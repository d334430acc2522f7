"""Compressed text files -> numbered lines, in chunks, with everything before a truncation kept."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs as pafs

LINES_PER_CHUNK = 100_000
"""Lines that are parsed, checked and written together: bounds the memory of a reading task."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLOCK_BYTES = 1 << 20
_COMPRESSED_BYTES = 1 << 14
"""Read at a time from compressed files: what is lost before a damaged place, at most."""


class BrokenStreamError(Exception):
    """The file ends early or its compressed data are damaged; `args[0]` is the reason for the rejected row."""


@dataclass
class LineChunk:
    """Consecutive lines of a file, without line ends.

    Args:
        first_row: 1-based number of the first line.
        lines: raw bytes; text is decoded where it is parsed, so that one bad line spoils nothing else.
        broken: why the file ends after this chunk, or None. The last line is then the incomplete one.
    """

    first_row: int
    lines: list[bytes]
    broken: str | None = None


def read_chunks(
    filesystem: pafs.FileSystem, path: str, lines_per_chunk: int = LINES_PER_CHUNK
) -> Iterator[LineChunk]:
    """Lines of a plain, gzip (`.gz`) or Zstandard (`.zst`) file in chunks; the last one reports a damaged end."""
    row, rest, broken, first = 1, b"", None, True
    lines: list[bytes] = []
    blocks = _decompressed(filesystem, path)
    while True:
        try:
            block = next(blocks, None)
        except BrokenStreamError as error:
            broken, block = str(error), None
        if block is None:
            break
        if first:
            block, first = block.removeprefix(_BYTE_ORDER_MARK), False
        *complete, rest = (rest + block).split(b"\n")
        lines.extend(complete)
        while len(lines) > lines_per_chunk:
            yield LineChunk(row, _without_returns(lines[:lines_per_chunk]))
            row, lines = row + lines_per_chunk, lines[lines_per_chunk:]
    if rest or broken:
        lines.append(rest)
    if lines:
        yield LineChunk(row, _without_returns(lines), broken)


def _without_returns(lines: list[bytes]) -> list[bytes]:
    return [line[:-1] if line.endswith(b"\r") else line for line in lines]


def _decompressed(filesystem: pafs.FileSystem, path: str) -> Iterator[bytes]:
    with filesystem.open_input_stream(path, compression=None) as stream:
        if path.endswith((".gz", ".gzip")):
            yield from _inflate(stream)
        elif path.endswith((".zst", ".zstd")):
            yield from _expand(stream)
        else:
            while block := stream.read(_BLOCK_BYTES):
                yield bytes(block)


def _inflate(stream: pa.NativeFile) -> Iterator[bytes]:
    """Decompress one or more concatenated gzip members, yielding all that can be had before an error.

    Python's zlib rather than pyarrow's stream, which withholds up to a block before the place where a file ends early.
    """
    decoder, begun = zlib.decompressobj(wbits=31), False
    while data := stream.read(_COMPRESSED_BYTES):
        while data:
            begun = True
            try:
                out = decoder.decompress(data)
            except zlib.error as error:
                raise BrokenStreamError(f"damaged compression: {error}") from error
            if out:
                yield out
            data = b""
            if decoder.eof:
                data, decoder, begun = decoder.unused_data, zlib.decompressobj(wbits=31), False
    if begun:
        raise BrokenStreamError("truncated")


def _expand(stream: pa.NativeFile) -> Iterator[bytes]:
    """Decompress Zstandard frames; an early end costs at most its last block, which cannot be decoded."""
    expanded = pa.CompressedInputStream(stream, "zstd")
    while True:
        try:
            block = expanded.read(_BLOCK_BYTES >> 6)
        except OSError as error:
            is_short = "runcated" in str(error)
            raise BrokenStreamError("truncated" if is_short else f"damaged compression: {error}") from error
        if not block:
            return
        yield bytes(block)
