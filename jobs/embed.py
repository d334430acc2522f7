"""Encode titles and histories.

    $ python jobs/embed.py jobs/configs/quickstart.toml
    $ ray job submit --working-dir . -- python jobs/embed.py jobs/configs/quickstart.toml workspace=/shared/ws

Reads   <workspace>/prepare
Writes  <workspace>/embed: item_vectors, user_vectors; manifest.json last
Exit    0 done or already done; 2 bad configuration; 1 anything else
"""

import sys

from distributed_mi.cli import main

if __name__ == "__main__":
    sys.exit(main(["embed", *sys.argv[1:]]))
