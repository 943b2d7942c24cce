"""How a command ends: done is 0, a fault 1, wrong input 2; what went wrong is one line on stderr.

A place that cannot be one is wrong input; a disk that is full or read-only is a fault.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

from bfm.errors import CorruptError, DivergedError, PausedError, UserError
from bfm.files import check_encoding

_NO_PLACE = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}


def exit_code(verb: Callable[[], int]) -> int:
    """That of a verb, which says itself how it ended where nothing went wrong. BFM_DEBUG=1 raises what did."""
    try:
        check_encoding()
        return verb()
    except (UserError, CorruptError, DivergedError, PausedError, OSError, MemoryError) as error:
        if os.environ.get("BFM_DEBUG"):
            raise
        if isinstance(error, OSError) and error.errno in _NO_PLACE and error.filename:
            what = str(error.strerror).lower()
            error = UserError(what, file=str(error.filename), fix="choose another place")
        line = str(error) if isinstance(error, (UserError, PausedError)) else f"{type(error).__name__}: {error}"
        print(f"bfm: {' '.join(line.split())}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        return 130
