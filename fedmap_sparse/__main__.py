"""`python -m fedmap_sparse` is `fedmap-sparse`."""

import sys

from fedmap_sparse.cli import main

sys.exit(main())
