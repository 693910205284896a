"""One folder per op: reference.py (the maths), triton_kernel.py (if any), op.py (checks, choice, registration)."""
