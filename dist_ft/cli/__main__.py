"""Makes `python -m dist_ft.cli` the same as the command `dist-ft`."""

from __future__ import annotations

from dist_ft.cli.main import main

# Jobs, pods and drills start this form: it needs the package, but no script on PATH.
if __name__ == "__main__":
    main()
