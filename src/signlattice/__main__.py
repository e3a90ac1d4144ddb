"""``python -m signlattice``: the command line, as ``signlattice`` is."""

from __future__ import annotations

import sys

from signlattice.cli import main

if __name__ == "__main__":
    sys.exit(main())
