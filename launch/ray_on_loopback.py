"""Run `ray` with 127.0.0.1 as this machine's address: python launch/ray_on_loopback.py start ...

Ray replaces 127.0.0.1 by the machine's address in its network, and its processes then listen on all
interfaces. A cluster whose nodes are all on this machine needs no other address than 127.0.0.1, on
which they then listen.
"""

from __future__ import annotations

import os
import sys

from ray._private import ray_constants, services
from ray.scripts.scripts import main


def keep_address(host: str) -> str:
    """Return `host`, where Ray would look up the machine's address in its network."""
    return host


if __name__ == "__main__":
    # In this process by the function, because with the variable Ray starts no second node. In the
    # processes of the nodes, and the jobs on them, by the variable.
    ray_constants.ENABLE_RAY_CLUSTER = True
    services.resolve_ip_for_localhost = keep_address
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    sys.argv[0] = "ray"
    main()
