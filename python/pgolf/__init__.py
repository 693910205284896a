"""Trainer and evaluator for small GPTs over pgolf_kernels.

Threads that wait sleep instead of spinning. On two quiet cores this costs 10 % of a training step; where another
process takes a share of a core, spinning threads wait for each other's time slices and a step takes 5 to 25 times as
long (measured: 0.5 s against 2.5 to 13 s). OpenMP reads the setting once, so it stands here, before torch is imported.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
