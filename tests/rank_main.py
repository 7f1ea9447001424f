"""One rank of a test: runs each config of a JSON file, one after the other, in this process."""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from dist_ft.config.load import load_config
    from dist_ft.runtime import local

    with open(sys.argv[1]) as file:
        configs = json.load(file)
    import torch.distributed as dist

    if int(os.environ["WORLD_SIZE"]) > 1 or any(c["cluster"]["workers"] for c in configs):
        dist.init_process_group("gloo")
    for config in configs:
        local.run(load_config(config))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
