"""SLOT in CUDA C++ (csrc/slot/slot_cuda.cu): gathers the rows, multiplies them with the head once, hands over pointers.

The surprise is the fixed shape of that product: a library may pick another algorithm, and so other bits, for another
number of rows. So windows are multiplied in groups whose size depends on their own number of rows alone, and a group
that the batch does not fill takes whatever lies behind it along.

What a call costs the host, 32 windows of 2048 rows (V 1024), beside 4 to 7 allocations:
    fit     1 launch for the parameters, 2 that count and gather, 4 products, then 2 to 6 launches a step;
            with ONE_LAUNCH 1 after each product, for all steps of 8 windows
    score   2 launches that count and gather, then a product and a launch; one more for delta
and nothing waits for the device if the caller tells num_rows; else one read of 5 B integers does, after the count.
"""

from collections.abc import Iterator
from itertools import groupby, pairwise

import torch
from torch import Tensor

from ... import extension
from ...dispatch import MAX_GRID_ROWS, why_not_counted
from .optimizers import LBFGS, AdamW
from .problem import Fit, Score, address, check_facts, window_stride

# All AdamW steps of a window in one launch, where the form allows it. Off until it has been measured on a GPU against a
# launch and more per step, which has been; the benchmark times both.
ONE_LAUNCH = False
WINDOWS_PER_PRODUCT = 8
ROWS_PER_LAUNCH = 16384  # two segments for every multiprocessor; at V 1024, 32 MB that a cache of 50 MB keeps
MIN_ROWS_PER_PRODUCT = 2048  # enough tiles for every multiprocessor, and little wasted on a single window


def why_not(p: Fit | Score) -> str | None:
    """None if the CUDA kernels can run p."""
    if p.hidden.device.type != "cuda" or p.hidden.dtype not in (torch.float32, torch.bfloat16):
        return f"the CUDA kernels need float32 or bfloat16 CUDA tensors, got {p.hidden.dtype} on {p.hidden.device}"
    if reason := extension.why_not_cuda(p.hidden.device):
        return reason
    if len(p.weight) > extension.cuda.SLOT_MAX_VOCAB:
        return f"the CUDA kernels need a vocabulary of at most {extension.cuda.SLOT_MAX_VOCAB}, got {len(p.weight)}"
    B, T, D = p.hidden.shape  # a window's rows are padded to whole segments, of up to 64
    return (
        why_not_counted(rows=B * (T + 64))
        or why_not_counted(8 * MAX_GRID_ROWS, windows=B)  # 8 or 32 of them at a time, in slot_update.cuh
        or why_not_counted(32 * MAX_GRID_ROWS, features=D)
    )


def why_not_fit(p: Fit) -> str | None:
    """None if the CUDA kernels can fit p."""
    if not isinstance(p.optimizer, AdamW | LBFGS):
        return f"the CUDA kernels fit with AdamW or LBFGS, got {type(p.optimizer).__name__}"
    if reason := why_not(p):
        return reason
    most = extension.cuda.SLOT_MAX_HISTORY
    if isinstance(p.optimizer, LBFGS) and p.optimizer.history > most:
        return f"the CUDA kernels keep at most {most} curvature pairs, got history={p.optimizer.history}"
    return None


class _Rows:
    """The rows that take part, gathered; keeps every tensor that the kernels point into alive."""

    def __init__(self, p: Fit | Score) -> None:
        cuda, device, scored = extension.cuda, p.hidden.device, isinstance(p, Score)
        mask = p.rows if scored else p.mask
        if mask.dtype not in (torch.bool, torch.float32, torch.float64):
            mask = mask.float()
        hidden, self.weight, targets, mask = (t.contiguous() for t in (p.hidden, p.weight, p.targets, mask))
        self.inputs = hidden, targets, mask
        B, T, D = hidden.shape
        self.problem = cuda.SlotProblem(
            hidden=address(hidden),
            weight=address(self.weight),
            targets=address(targets),
            mask=address(mask),
            mask_type=_mask_type(mask.dtype),
            whole_batch=not scored and p.normalize == "batch",
            sizes=(B, T, D, len(self.weight)),
            bf16=hidden.dtype == torch.bfloat16,
            softcap=p.softcap or 0.0,
            before=p.norm == "before",
            device=device.index or 0,
            stream=torch.cuda.current_stream(device).cuda_stream if hidden.is_cuda else 0,
        )
        facts = torch.empty(5, B, dtype=torch.int64, device=device)
        cuda.slot_count(self.problem, address(facts))
        self.room = _read(p, facts) if p.told is None else p.told
        self.layout = cuda.SlotLayout(self.room)
        self.first_row = self.layout.first_row
        self.products = products(self.first_row, len(self.weight))
        # A product may take rows along behind the last window's.
        self.hidden = hidden.new_empty(max(first + count for _, _, first, count in self.products), D)
        integers = torch.empty(self.layout.num_integers, dtype=torch.int32, device=device)
        weights = None if scored else torch.empty(self.first_row[-1], device=device)
        self.rows = cuda.SlotRows(
            self.layout, integers=address(integers), weight=address(weights), hidden=address(self.hidden)
        )
        self.kept = facts, integers, weights
        cuda.slot_gather(self.problem, self.layout, self.rows, address(facts))

    def multiply(self, rows_at_once: int) -> Iterator[tuple[int, int, object]]:
        """Make base logits; yield (first window, last window + 1, what the kernels take) about rows_at_once at a time.

        The next ones take the place of the last, whose reader is in the same stream, ahead of them.
        """
        V, batches = len(self.weight), [[self.products[0]]]
        for product in self.products[1:]:
            row, count = product[2:]
            if row + count - batches[-1][0][2] <= rows_at_once:
                batches[-1].append(product)
            else:
                batches.append([product])
        # A product may take more rows along than the next ones in its batch need.
        size = max(row + count - batch[0][2] for batch in batches for _, _, row, count in batch)
        self.logits = self.hidden.new_empty(size, -(-V // 8) * 8)
        weight = self.weight.T
        for batch in batches:
            start = batch[0][2]
            for _, _, row, count in batch:
                torch.mm(self.hidden[row : row + count], weight, out=self.logits[row - start : row - start + count, :V])
            stride = self.logits.shape[1]
            logits = extension.cuda.SlotLogits(data=address(self.logits), stride=stride, first_row=start)
            yield batch[0][0], batch[-1][1], logits


def _mask_type(dtype: torch.dtype):
    kinds = extension.cuda.SlotMask
    return {torch.bool: kinds.boolean, torch.float32: kinds.float32, torch.float64: kinds.float64}[dtype]


def _read(p: Fit | Score, facts: Tensor) -> list[int]:
    """The number of rows in each window: the one place where the host waits for the device."""
    num_rows, lowest, highest, valid, _ = facts.tolist()
    op = "slot_score" if isinstance(p, Score) else "slot_fit"
    return check_facts(op, num_rows, min(lowest), max(highest), all(valid), len(p.weight), None)


def products(first_row: list[int], V: int) -> list[tuple[int, int, int, int]]:
    """(first window, last window + 1, first row, number of rows) of each product; first_row has the end behind it."""
    # For a large vocabulary the rows that a product takes along cost more than a launch.
    several = WINDOWS_PER_PRODUCT if V <= 2048 else 1
    found, i = [], 0
    for n, windows in groupby(end - first for first, end in pairwise(first_row)):
        end = i + len(list(windows))
        if n:
            at_once = max(several, MIN_ROWS_PER_PRODUCT // n)
            found += [(j, min(j + at_once, end), first_row[j], at_once * n) for j in range(i, end, at_once)]
        i = end
    return found


def fit(p: Fit, one_launch: bool | None = None) -> tuple[Tensor, Tensor]:
    """Return the parameters [G, P] and the losses [steps, G], as reference.fit does.

    Args:
        one_launch: all AdamW steps of a window in one launch where the form allows it; None: as ONE_LAUNCH says.
    """
    x, joint = p.start, isinstance(p.optimizer, LBFGS) and p.optimizer.joint
    if not len(p.hidden):
        return x, x.new_zeros(p.steps, 1 if joint else len(x))
    cuda, gathered = extension.cuda, _Rows(p)
    problem, layout, rows = gathered.problem, gathered.layout, gathered.rows
    losses = x.new_empty(p.steps, 1 if joint else len(x))
    form = cuda.SlotForm(delta=p.parameters != "bias", bias=p.parameters != "delta", shared=p.shared)
    if isinstance(p.optimizer, LBFGS):
        optimizer = _lbfgs(p)
        workspace = x.new_empty(cuda.slot_lbfgs_bytes(problem, layout, form, optimizer), dtype=torch.uint8)
    else:
        optimizer = _adamw(p)
        workspace = x.new_empty(cuda.slot_adamw_bytes(problem, layout, form), dtype=torch.uint8)
        if (ONE_LAUNCH if one_launch is None else one_launch) and cuda.slot_fits_one_launch(problem, form):
            pointers = {"x": address(x), "losses": address(losses), "workspace": address(workspace)}
            for first, last, logits in gathered.multiply(ROWS_PER_LAUNCH):
                cuda.slot_fit_in_one_launch(problem, layout, rows, logits, form, optimizer, first, last, **pointers)
            return x, losses
    for _, _, logits in gathered.multiply(len(gathered.hidden)):  # one batch: every row
        cuda.slot_fit(
            problem,
            layout,
            rows,
            logits,
            form,
            optimizer,
            x=address(x),
            losses=address(losses),
            workspace=address(workspace),
        )
    return x, losses


def _adamw(p: Fit):
    o = p.optimizer
    return extension.cuda.SlotAdamW(
        learning_rates=o.learning_rates(p.steps),
        beta1=o.betas[0],
        beta2=o.betas[1],
        eps=o.eps,
        weight_decay=o.weight_decay,
    )


def _lbfgs(p: Fit):
    o = p.optimizer
    return extension.cuda.SlotLbfgs(
        lr=o.lr,
        tolerance_grad=o.tolerance_grad,
        tolerance_change=o.tolerance_change,
        steps=p.steps,
        max_iter=o.max_iter,
        history=o.history,
        max_eval=o.max_iter * 5 // 4 if o.max_eval is None else o.max_eval,
        max_line_search=-1 if o.max_line_search is None else o.max_line_search,
        joint=o.joint,
    )


def score(p: Score) -> Tensor:
    """Return the negative log-likelihoods, as reference.score does."""
    if not len(p.hidden):
        return torch.empty(0, device=p.hidden.device)
    gathered = _Rows(p)
    delta, bias = (None if v is None else v.contiguous() for v in (p.delta, p.bias))
    shift = None if delta is None else delta.new_empty(len(delta), len(p.weight))
    nll = torch.empty(sum(gathered.room), device=p.hidden.device)
    for first, last, logits in gathered.multiply(ROWS_PER_LAUNCH):
        extension.cuda.slot_score(
            gathered.problem,
            gathered.layout,
            gathered.rows,
            logits,
            first,
            last,
            delta=address(delta),
            delta_stride=window_stride(delta),
            bias=address(bias),
            bias_stride=window_stride(bias),
            shift=address(shift),
            nll=address(nll),
        )
    return nll
