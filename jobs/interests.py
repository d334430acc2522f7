"""Write and encode the exemplars' interests.

    $ python jobs/interests.py jobs/configs/quickstart.toml
    $ ray job submit --working-dir . -- python jobs/interests.py jobs/configs/quickstart.toml workspace=/shared/ws

Reads   <workspace>/prepare, <workspace>/exemplars
Writes  <workspace>/interests: answers, interests, interest_vectors; manifest.json last
Exit    0 done or already done; 2 bad configuration; 1 anything else
"""

import sys

from distributed_mi.cli import main

if __name__ == "__main__":
    sys.exit(main(["interests", *sys.argv[1:]]))
