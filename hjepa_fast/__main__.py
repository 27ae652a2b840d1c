"""`python -m hjepa_fast` is the command line `hjepa-fast`."""

import sys

from .cli import main

sys.exit(main())
