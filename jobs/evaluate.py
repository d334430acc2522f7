"""Rank the whole catalogue for held-out users.

    $ python jobs/evaluate.py jobs/configs/quickstart.toml
    $ ray job submit --working-dir . -- python jobs/evaluate.py jobs/configs/quickstart.toml workspace=/shared/ws

Reads   <workspace>/prepare, <workspace>/train/<run>
Writes  <workspace>/evaluate/<run>: report.json, report.md, plots, per_user; manifest.json last
Exit    0 done or already done; 2 bad configuration; 1 anything else
"""

import sys

from distributed_mi.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
