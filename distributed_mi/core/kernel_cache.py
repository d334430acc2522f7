"""Compiled kernels on disk that are as new as all sources that they were made of.

numba keeps what it compiled beside a source file and compiles again when that file changes. A kernel contains the ones
that it calls, also those of other files, and numba does not look at these: without more, a step would go on with an old
loss after an update. So all of it is forgotten when any of the sources has changed.
"""

import errno
import functools
import hashlib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
SOURCES = ("**/*kernels.py", "core/vector_math.py", "core/watching.py")
_NOTE = "kernels.sha256"
_CANNOT_WRITE = {errno.EACCES, errno.EPERM, errno.EROFS}


@functools.cache
def forget_outdated_kernels(package: Path = PACKAGE) -> None:
    """Remove numba's files of the package unless they were made of the sources that are there.

    Where `__pycache__` cannot be written numba keeps its files elsewhere and nothing is done.
    """
    sources = sorted({path for pattern in SOURCES for path in package.glob(pattern)})
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    for folder in {path.parent / "__pycache__" for path in sources}:
        note = folder / _NOTE
        if note.is_file() and note.read_text() == digest:
            continue
        try:
            folder.mkdir(exist_ok=True)
            for index in folder.glob("*.nbi"):
                index.unlink(missing_ok=True)  # another process may be doing the same
            note.write_text(digest)
        except OSError as error:
            if error.errno not in _CANNOT_WRITE:
                raise
