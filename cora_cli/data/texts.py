"""Read the text of data files, which may be compressed."""

import bz2
import codecs
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cora_cli.errors import CoraError
from cora_cli.reading import decoded, read_bytes

_TO_UTF8 = "; save it as UTF-8, or convert it: `iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW` does so for one of a Western European Windows"
_OTHER_KINDS = {
    b"\x1f\x8b": "a file of gzip: add .gz to its name",
    b"\x28\xb5\x2f\xfd": "a file of zstd: add .zst to its name",
    b"BZh": "a file of bzip2: add .bz2 to its name",
    b"\xfd7zXZ": "a file of xz: add .xz to its name",
    b"PAR1": "Parquet: give it the ending .parquet",
    b"PK\x03\x04": "a workbook of Excel or another zip archive: save the table as CSV, or unpack the archive",
}
"""What a file is that begins so and is no text, with what helps."""
_PIECE = 1 << 14
"""Bytes that a compressed stream is given at once."""
_PADDING = re.compile(rb"\0*")


def text_of(path: Path) -> str:
    """The text of a data file with its line ends unchanged, since a quoted CSV field may contain any of them.

    It is UTF-8, or what the mark at its begin says: Windows PowerShell and spreadsheets write UTF-16.
    """
    content = read_bytes(path)
    if (expand := COMPRESSIONS.get(path.suffix.lower())) is not None:
        try:
            content = expand(content)
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            raise CoraError(f"{path} cannot be decompressed: {error}") from error
    # The mark of UTF-32 begins as one of UTF-16 does.
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and not content.startswith(codecs.BOM_UTF32_LE):
        try:
            return content.decode("utf-16")
        except UnicodeDecodeError as error:
            raise CoraError(f"{path} begins as UTF-16 text, but is none: {error.reason}; save it as UTF-8") from error
    kind = next((kind for begin, kind in _OTHER_KINDS.items() if content.startswith(begin)), None)
    if kind is None and (wide := _wide_encoding(content)):
        raise CoraError(f"{path} is not UTF-8 text, but {wide}; convert it: `iconv -f {wide} -t UTF-8 OLD > NEW`")
    return decoded(content, path, f", but {kind}" if kind else _TO_UTF8).removeprefix("\ufeff")


def _wide_encoding(content: bytes) -> str | None:
    """The encoding of text in which most characters have bytes of zero, and no mark at the begin that `text_of` knows; None for other text."""
    begin = content[:400]
    zeros = begin.count(0)
    if 4 * zeros < len(begin) or not zeros:
        return None
    name = "UTF-32" if 2 * zeros > len(begin) else "UTF-16BE" if begin[0] == 0 else "UTF-16LE"
    try:
        content.decode(name)
    except UnicodeDecodeError:
        return None
    return name


def _expanded(begin: Callable[[], Any]) -> Callable[[bytes], bytes]:
    """Expand one compressed stream after the other, as `cat a.gz b.gz` writes them.

    The modules' own functions leave out what follows the first stream, or is cut off, without a word.
    """

    def expand(data: bytes) -> bytes:
        parts, place = [], 0
        while place < len(data):
            stream = begin()
            while not stream.eof:
                # Each stream copies what it was given and did not need, and there may be one for every record.
                if not (piece := data[place : place + _PIECE]):
                    raise EOFError("the file ends before the compressed data do")
                parts.append(stream.decompress(piece))
                place += len(piece) - len(stream.unused_data)
            padding = _PADDING.match(data, place)
            place = padding.end() if padding else place
        return b"".join(parts)

    return expand


def _expanded_zstd(data: bytes) -> bytes:
    import pyarrow

    with pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd") as stream:
        return bytes(stream.read())


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": _expanded(lambda: zlib.decompressobj(wbits=31)),
    ".bz2": _expanded(bz2.BZ2Decompressor),
    ".xz": _expanded(lzma.LZMADecompressor),
    ".zst": _expanded_zstd,
}
"""How a compressed file of text is expanded, by the last ending of its name."""
