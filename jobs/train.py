"""Train one recommender.

    $ python jobs/train.py jobs/configs/quickstart.toml
    $ ray job submit --working-dir . -- python jobs/train.py jobs/configs/quickstart.toml workspace=/shared/ws

Reads   <workspace>/prepare, and embed, exemplars, interests when the model asks for them
Writes  <workspace>/train/<run>: config.json, metrics.jsonl, checkpoints, model; manifest.json last
Exit    0 done or already done; 2 bad configuration; 1 anything else
"""

import sys

from distributed_mi.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
