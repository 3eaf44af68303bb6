"""`python -m sdft` is the command `sdft`, where that is not on the path."""

import sys

from sdft.cli import main

sys.exit(main())
