"""Before torch is imported: waiting threads sleep, as in `pgolf`, so that tests keep their pace on a shared machine."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
