import sys

from fedmap_sparse.cli import main

sys.exit(main())
