"""Gives mutated inputs to everything that dist_ft reads, and reports what it does not survive.

    python tests/fuzz --kind configs --cases 2000 --seed 1    # one kind
    python tests/fuzz --cases 500                             # 500 cases of every kind
    python tests/fuzz --quick                                 # what CI runs, cases/ included
    python tests/fuzz --replay tests/fuzz/cases/*.json        # single cases again
    python tests/fuzz --kind rows --first 17 --cases 1 --show # one case, with its output

Survived is a result, or one clear error, within 10 s and a GiB, written nowhere else. Each failure
is made smaller and saved below --save; moved into tests/fuzz/cases/, CI replays it from then on.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KEPT_VARIABLES = ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "DIST_FT_SHARED")
VARIABLES = {
    "LANG": "C.UTF-8",
    "COLUMNS": "120",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_GCE_CHECK": "true",
    "PYTHONDONTWRITEBYTECODE": "1",
}


def main() -> None:
    """Parse the command line, prepare this process, and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kind", action="append", help="a kind of inputs; repeatable; default: all"
    )
    parser.add_argument("--cases", type=int, default=200, help="cases of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    parser.add_argument("--quick", action="store_true", help="the cases of CI")
    parser.add_argument("--replay", nargs="+", type=Path, default=[], help="files of single cases")
    parser.add_argument("--show", action="store_true", help="print what each case printed")
    parser.add_argument("--save", type=Path, help="folder for failures; default: none are saved")
    parser.add_argument("--json", type=Path, help="file for all results")
    arguments = parser.parse_args()

    # Before anything heavy is imported: libraries read these variables once.
    scratch_parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="dist_ft-fuzz-", dir=scratch_parent) as scratch:
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        os.environ.clear()
        os.environ.update(VARIABLES | kept, HOME=scratch, HF_HOME=f"{scratch}/hf", TMPDIR=scratch)
        sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != HERE]
        sys.path[:0] = [str(HERE.parent), str(ROOT)]

        from fuzz import session

        code = session.run(arguments, Path(scratch))
    sys.exit(code)


if __name__ == "__main__":
    main()
