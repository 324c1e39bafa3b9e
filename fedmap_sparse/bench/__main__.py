import sys

from fedmap_sparse.bench import main

sys.exit(main())
