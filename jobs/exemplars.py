"""Choose exemplar users by affinity propagation.

    $ python jobs/exemplars.py jobs/configs/quickstart.toml
    $ ray job submit --working-dir . -- python jobs/exemplars.py jobs/configs/quickstart.toml workspace=/shared/ws

Reads   <workspace>/embed
Writes  <workspace>/exemplars: exemplars, assignment, messages; report.md with its plots; manifest.json last
Exit    0 done or already done; 2 bad configuration; 1 anything else
"""

import sys

from distributed_mi.cli import main

if __name__ == "__main__":
    sys.exit(main(["exemplars", *sys.argv[1:]]))
