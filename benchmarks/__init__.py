"""Benchmarks: bench.py is the harness, ops/bench_<op>.py the cases of one op, results/<op>.csv what was measured."""
