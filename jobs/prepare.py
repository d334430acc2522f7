"""Turn raw logs into a catalogue and time-ordered sequences.

    $ python jobs/prepare.py jobs/configs/quickstart.toml
    $ ray job submit --working-dir . -- python jobs/prepare.py jobs/configs/quickstart.toml workspace=/shared/ws

Reads   what the `data` table names
Writes  <workspace>/prepare: catalogue, sequences/{train,validation,test}, rejected; manifest.json last
Exit    0 done or already done; 2 bad configuration; 1 anything else
"""

import sys

from distributed_mi.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
