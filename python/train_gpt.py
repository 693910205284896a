"""The published systems by their own commands: SEED=42 ... torchrun ... python/train_gpt.py --preset pr1333."""

import sys

from pgolf.script import main

sys.exit(main())
