"""Interleaved timing of ours against peers, on a CPU that others share or on a GPU.

A round times ours and then every peer, every other round in reversed order; only ratios within a round are compared.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

MIN_SAMPLE_SECONDS = 4e-3  # shorter samples see the scheduler's tick more than the kernel
QUIET = 0.02  # share of a sample that our threads may have spent waiting for a core
ENOUGH_ROUNDS = 25
MAX_CUDA_SECONDS = 15.0  # of rounds, where one is long: ten at least


@dataclass(frozen=True)
class Result:
    """Ours against one peer, over the rounds that counted."""

    ratios: list[float]  # peer / ours, one per round
    ms: float
    peer_ms: float
    waited: float = 0.0  # the largest share of a sample that our threads waited for a core, among the rounds counted

    def columns(self) -> dict:
        """The columns of a result row."""
        ordered = sorted(self.ratios)
        p20, p80 = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8))
        return {
            "ratio_median": round(statistics.median(ordered), 3),
            "ratio_p20": round(p20, 3),
            "ratio_p80": round(p80, 3),
            "ms": round(self.ms, 5),
            "peer_ms": round(self.peer_ms, 5),
            "rounds": len(ordered),
            "waited": round(self.waited, 4),
        }


Sample = tuple[float, float]  # seconds per call, share of the time waited for a core


def _turns(calls: dict[str, Callable], sample: Callable[[str], Sample], rounds: int, stop: Callable) -> list[dict]:
    """One dict name -> Sample per round; the order flips, so that nobody always runs after the same rival."""
    history = []
    for i in range(rounds):
        order = list(calls) if i % 2 == 0 else list(reversed(calls))
        history.append({name: sample(name) for name in order})
        if stop(history):
            break
    return history


def _result(history: list[dict], peer: str) -> Result:
    """Ours against `peer` over the quiet rounds; over the five least disturbed ones if fewer than five are quiet."""

    def disturbance(turn: dict) -> float:
        return max(turn["ours"][1], turn[peer][1])

    counted = [turn for turn in history if disturbance(turn) <= QUIET]
    if len(counted) < 5:
        counted = sorted(history, key=disturbance)[:5]
    return Result(
        ratios=[turn[peer][0] / turn["ours"][0] for turn in counted],
        ms=1e3 * statistics.median(turn["ours"][0] for turn in counted),
        peer_ms=1e3 * statistics.median(turn[peer][0] for turn in counted),
        waited=max(disturbance(turn) for turn in counted),
    )


def run_queue_wait_seconds() -> float:
    """Time that this process's threads have spent runnable but without a core, all together (Linux; 0 elsewhere)."""
    waited = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            waited += int(path.read_text().split()[1])
        except OSError:  # the thread ended between the listing and the reading
            continue
    return waited / 1e9


def compare_cpu(ours: Callable, peers: dict, buffers: list[tuple], quick: bool) -> Iterator[tuple[str, str, Result]]:
    """("eager", peer, Result) for each peer."""
    calls = {"ours": ours} | peers
    repeats = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call(*buffers[0])
        repeats[name] = max(1, round(MIN_SAMPLE_SECONDS / (time.perf_counter() - start)))

    def sample(name: str) -> Sample:
        call, n = calls[name], repeats[name]
        waited, start = run_queue_wait_seconds(), time.perf_counter()
        for i in range(n):
            call(*buffers[i % len(buffers)])
        seconds = time.perf_counter() - start
        return seconds / n, (run_queue_wait_seconds() - waited) / seconds

    begin, budget = time.perf_counter(), 2.0 if quick else 30.0

    def stop(history: list[dict]) -> bool:
        quiet = sum(max(waited for _, waited in turn.values()) <= QUIET for turn in history)
        return len(history) >= 5 and (quiet >= ENOUGH_ROUNDS or time.perf_counter() - begin > budget)

    history = _turns(calls, sample, 7 if quick else 400, stop)
    for peer in peers:
        yield "eager", peer, _result(history, peer)


def _graphed(call: Callable, inputs: tuple) -> Callable | None:
    """The call captured in a CUDA graph, or None if it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call(*inputs)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def compare_cuda(ours: Callable, peers: dict, buffers: list[tuple], quick: bool) -> Iterator[tuple[str, str, Result]]:
    """("graph", peer, Result) for what can be captured, then ("eager", peer, Result) for every peer."""
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    flush = torch.empty(max(2 * l2_bytes, 64 << 20), dtype=torch.uint8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    calls = {"ours": ours} | peers
    eager = {name: [lambda c=call, b=b: c(*b) for b in buffers] for name, call in calls.items()}
    graphed = {name: [_graphed(call, b) for b in buffers] for name, call in calls.items()}
    graphed = {name: runs for name, runs in graphed.items() if None not in runs}
    for timing, runs in (("graph", graphed), ("eager", eager)):
        if "ours" not in runs:
            continue
        turn = dict.fromkeys(runs, 0)

        def sample(name: str, runs: dict = runs, turn: dict = turn) -> Sample:
            call = runs[name][turn[name] % len(buffers)]
            turn[name] += 1
            flush.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3, 0.0

        warm = _turns(runs, sample, 3, lambda history: False)  # the clocks, too
        one = sum(seconds for seconds, _ in warm[-1].values())
        rounds = 10 if quick else max(10, min(60, round(MAX_CUDA_SECONDS / one)))
        history = _turns(runs, sample, rounds, lambda history: False)
        for peer in peers:
            if peer in runs:
                yield timing, peer, _result(history, peer)
