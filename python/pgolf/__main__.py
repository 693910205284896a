"""`python -m pgolf` is `pgolf`."""

import sys

from .cli import main

sys.exit(main())
