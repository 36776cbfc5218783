"""`python -m molmo2core.loading inspect`: see stages/inspect_data.py.  A command line stands above all layers."""

from __future__ import annotations

import sys

from molmo2core.stages.inspect_data import main

if __name__ == "__main__":
    sys.exit(main())
