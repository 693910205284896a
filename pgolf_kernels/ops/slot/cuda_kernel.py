"""SLOT in CUDA C++ (csrc/slot/slot_cuda.cu): gathers the rows, multiplies them with the head once, hands over pointers.

The surprise is the fixed shape of that product: a library may pick another algorithm, and so other bits, for another
number of rows. So windows are multiplied in groups whose size depends on their own number of rows alone, and a group
that the batch does not fill takes whatever lies behind it along.
"""

from itertools import groupby

import torch
from torch import Tensor

from ... import extension
from .optimizers import LBFGS
from .problem import Fit, Score, address, window_stride

ROWS_PER_PRODUCT = 2048  # enough tiles for every multiprocessor, and little wasted on a single window


def why_not(p: Fit | Score) -> str | None:
    """None if the CUDA kernels can run p."""
    if p.hidden.device.type != "cuda" or p.hidden.dtype not in (torch.float32, torch.bfloat16):
        return f"the CUDA kernels need float32 or bfloat16 CUDA tensors, got {p.hidden.dtype} on {p.hidden.device}"
    if reason := extension.why_not_cuda(p.hidden.device):
        return reason
    if len(p.weight) > extension.cuda.SLOT_MAX_VOCAB:
        return f"the CUDA kernels need a vocabulary of at most {extension.cuda.SLOT_MAX_VOCAB}, got {len(p.weight)}"
    return None


def why_not_fit(p: Fit) -> str | None:
    """None if the CUDA kernels can fit p."""
    if isinstance(p.optimizer, LBFGS):
        return "the CUDA kernels fit with AdamW only, got LBFGS"
    return why_not(p)


class _Rows:
    """The rows that take part, gathered and multiplied with the head; keeps every tensor it points into alive."""

    def __init__(self, p: Fit | Score) -> None:
        device = p.hidden.device
        hidden, weight, targets = (t.contiguous() for t in (p.hidden, p.weight, p.targets))
        self.problem = extension.cuda.SlotProblem(
            hidden=address(hidden),
            weight=address(weight),
            targets=address(targets),
            sizes=(*hidden.shape, len(weight)),
            bf16=hidden.dtype == torch.bfloat16,
            softcap=p.softcap or 0.0,
            before=p.norm == "before",
            device=device.index or 0,
            stream=torch.cuda.current_stream(device).cuda_stream if hidden.is_cuda else 0,
        )
        unit = extension.cuda.SLOT_SEGMENT_ROWS
        padded = [-(-n // unit) * unit for n in p.num_rows]
        self.num_segments = sum(padded) // unit
        products = _products(padded)
        D, V = hidden.shape[2], len(weight)
        # A product may take rows along behind the last window's.
        size = max((first + count for first, count in products), default=0)
        rows = hidden.new_empty(size, D)
        logits = hidden.new_empty(size, -(-V // 8) * 8)

        def integers(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        scored = isinstance(p, Score)
        choice = (p.rows if scored else p.weights).contiguous()
        source, target, segment = integers(sum(padded)), integers(sum(padded)), integers(2, self.num_segments)
        output = integers(sum(padded)) if scored else None
        weights = None if scored else torch.empty(sum(padded), device=device)
        window = integers(len(hidden) + 1)
        self.rows = extension.cuda.SlotRows(
            num_rows=p.num_rows,
            hidden=address(rows),
            logits=address(logits),
            stride=logits.shape[1],
            source=address(source),
            target=address(target),
            weight=address(weights),
            output=address(output),
            segment=address(segment),
            window=address(window),
        )
        self.tensors = [hidden, weight, targets, rows, logits, source, target, weights, output, segment, window]
        extension.cuda.slot_gather(
            self.problem, self.rows, weights=0 if scored else address(choice), wanted=address(choice) if scored else 0
        )
        for first, count in products:
            torch.mm(rows[first : first + count], weight.T, out=logits[first : first + count, :V])


def _products(padded: list[int]) -> list[tuple[int, int]]:
    """(first row, number of rows) of each product, for windows of so many rows one after another."""
    products, first = [], 0
    for n, windows in groupby(padded):
        num_windows = len(list(windows))
        if n:
            at_once = max(1, ROWS_PER_PRODUCT // n)
            products += [(first + i * n, at_once * n) for i in range(0, num_windows, at_once)]
        first += num_windows * n
    return products


def fit(p: Fit) -> tuple[Tensor, Tensor]:
    """Return the parameters [G, P] and the losses [steps, G], as reference.fit does."""
    gathered = _Rows(p)
    x = p.start.clone(memory_format=torch.contiguous_format)
    (G, P), S = x.shape, gathered.num_segments
    D, V = p.weight.shape[1], len(p.weight)
    delta, bias, before = p.parameters != "bias", p.parameters != "delta", p.norm == "before"

    def empty(wanted: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return x.new_empty(shape, dtype=dtype) if wanted else None

    workspace = {
        "losses": empty(True, p.steps, G),
        "moments": empty(True, 2, G, P),
        "shift": empty(delta, G, V),
        "sums": empty(delta, G, V),
        "partial": empty(delta or not before, S, V),
        "bias_partial": empty(bias and before, S, V),
        "depth_partial": empty(delta, -(-V // extension.cuda.SLOT_SEGMENT_ROWS), G, D),
        "row_partial": empty(delta and before, S, D),
        "slope": empty(delta and before, S * extension.cuda.SLOT_SEGMENT_ROWS),
        "loss_partial": empty(True, S, dtype=torch.float64),
    }
    if G:
        extension.cuda.slot_fit_adamw(
            gathered.problem,
            gathered.rows,
            learning_rates=p.optimizer.learning_rates(p.steps),
            beta1=p.optimizer.betas[0],
            beta2=p.optimizer.betas[1],
            eps=p.optimizer.eps,
            weight_decay=p.optimizer.weight_decay,
            delta=delta,
            bias=bias,
            shared=len(p.groups()) != len(p.hidden),
            x=address(x),
            **{name: address(tensor) for name, tensor in workspace.items()},
        )
    return x, workspace["losses"]


def score(p: Score) -> Tensor:
    """Return the negative log-likelihoods, as reference.score does."""
    gathered = _Rows(p)
    delta, bias = (None if v is None else v.contiguous() for v in (p.delta, p.bias))

    shift = None if delta is None else delta.new_empty(len(delta), len(p.weight))
    nll = torch.empty(sum(p.num_rows), device=p.hidden.device)
    extension.cuda.slot_score(
        gathered.problem,
        gathered.rows,
        delta=address(delta),
        delta_stride=window_stride(delta),
        bias=address(bias),
        bias_stride=window_stride(bias),
        shift=address(shift),
        nll=address(nll),
    )
    return nll
