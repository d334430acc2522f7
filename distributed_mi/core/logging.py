"""The one logging set-up. Library code asks for `logging.getLogger(__name__)`; only entry points call `setup`."""

import logging
import os
import sys

_FORMAT = "%(asctime)s %(levelname).1s %(message)s"


def setup(level: str = "INFO") -> None:
    """Send the project's log to standard error and quieten the libraries. Called once by an entry point or a worker."""
    root = logging.getLogger()
    if not any(getattr(h, "_distributed_mi", False) for h in root.handlers):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(_FORMAT, "%H:%M:%S"))
        handler._distributed_mi = True  # type: ignore[attr-defined]
        root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("distributed_mi").setLevel(os.environ.get("DMI_LOG_LEVEL", level))
