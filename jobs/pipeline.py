"""Every stage in order, skipping what is done.

    $ python jobs/pipeline.py jobs/configs/quickstart.toml
    $ ray job submit --working-dir . -- python jobs/pipeline.py jobs/configs/beauty-eimf.toml \
          workspace=/shared/beauty data.interactions=/shared/interactions.parquet data.items=/shared/items.parquet \
          scaling.num_workers=2

Reads   what the `data` table names
Writes  <workspace>: one directory for each stage
Exit    0 done or already done; 2 bad configuration; 1 anything else
"""

import sys

from distributed_mi.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
