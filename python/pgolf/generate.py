"""Sample from a model: one forward over the prompt, then a step per token against a KVCache.

    ids = generate(model, prompt, 256, temperature=0.8, seed=1)        # [B, T0] -> [B, T0 + 256]

The surprise is where chance comes from: every sequence draws all its uniform numbers beforehand, on the CPU, from a
generator of its own, and a token is where its number falls in the cumulated probabilities. So a sequence does not
depend on how many others are sampled beside it, and a step has nothing random in it: it can be captured in a CUDA graph
as it is.
"""

import copy
import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pgolf_kernels import Int6Weight, extension

from .errors import InputError
from .kv_cache import WINDOW, KVCache
from .model import GPT

# Sequences up to which a CPU steps faster by packed int6 matrices than by bfloat16 ones (27 million parameters: twice
# as fast at one, 1.1 times at 64, equal at 128). Against float32 ones they win at any number.
PACKED_MAX_ROWS = 64

Capture = Callable[[Callable[[], None]], Callable[[], object]]


@torch.no_grad()
def generate(
    model: GPT,
    prompt: Tensor,
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    packed: Mapping[str, Int6Weight] | None = None,
    capture: Capture | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Continue each prompt by num_tokens tokens.

    The rotary table is that of max(cfg.train_seq_len, T0 + num_tokens) tokens for all positions, see KVCache.

    Args:
        model: anywhere; unchanged.
        prompt: [B, T0] int64 on the model's device, T0 at least 1; a document begins with BOS.
        num_tokens: at least 1.
        temperature: divides the soft-capped logits; 0 takes the likeliest token (the lowest id of equals).
        top_k: draw from the k likeliest only; 0: from all.
        top_p: draw from the smallest set of the likeliest tokens (after top_k) that holds at least this probability.
        seed: of the draws. Same seed and device, same tokens; the first n sequences and tokens of a larger request are
            those of a smaller one (while T0 + num_tokens stays within train_seq_len, which keeps the rotary table).
        packed: the model's int6 matrices by published name, if it has any; used where they are faster.
        capture: makes something to replay of a step, without running it; None: a CUDA graph on a GPU, nothing on a CPU.
        on_progress: called with (tokens done, num_tokens).

    Returns:
        [B, T0 + num_tokens] int64: the prompt and its continuation.

    Raises:
        InputError: an argument is out of range.
    """
    device = model.tok_emb.weight.device
    _check(model.cfg.vocab_size, device, prompt, num_tokens, temperature, top_k, top_p, seed)
    batch, num_prompt = prompt.shape
    if capture is None and device.type == "cuda":
        capture = capture_cuda_graph
    model = inference_copy(model)
    cache = KVCache(model, batch, num_prompt + num_tokens, packed if packed_is_faster(model, batch) else None)
    ids = prompt.new_zeros(batch, num_prompt + num_tokens)
    ids[:, :num_prompt] = prompt
    uniform = torch.zeros(ids.shape, dtype=torch.float64)  # the number of the token at each place
    uniform[:, num_prompt:] = draw(seed, batch, num_tokens)
    uniform = uniform.to(device)

    def step(new: Tensor | None = None) -> None:
        """Take in the token at the cache's position (or all of `new`) and put the next one behind it."""
        new = ids.index_select(1, cache.position) if new is None else new
        logits = model.logits(new, cache, last_only=True)[:, 0]
        token = choose(logits, uniform.index_select(1, cache.position), temperature, top_k, top_p)
        ids.index_copy_(1, cache.position, token)

    run = step if capture is None else _Replayed(step, cache, capture)
    with torch.cuda.device_of(prompt):
        for done in range(num_tokens):
            if done == 0:
                step(prompt)
            else:
                run()
            if on_progress:
                on_progress(done + 1, num_tokens)
        if device.type == "cuda":
            torch.cuda.synchronize()  # a graph must outlive its last replay
    return ids


def choose(logits: Tensor, uniform: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The tokens, [B, 1] int64, that uniform numbers [B, 1] in (0, 1] fall on. logits: [B, V] float32."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    # Against the largest, or a temperature near 0 would make infinities of all.
    logits, order = (logits - logits.amax(-1, keepdim=True)).double() / temperature, None
    if 0 < top_k < logits.shape[-1] or top_p < 1:
        logits, order = logits.sort(dim=-1, descending=True, stable=True)
        logits = logits[:, :top_k] if top_k else logits
    cumulated = logits.softmax(-1).cumsum(-1)
    if top_p < 1:
        # Of what lies before a token: the token that reaches top_p belongs to the set, and the first always does.
        kept = (cumulated < top_p).sum(-1, keepdim=True).clamp_max(cumulated.shape[-1] - 1)
        total = cumulated.gather(-1, kept)
    else:
        total = cumulated[:, -1:]
    # The first place whose sum reaches uniform * total. uniform > 0, so its probability is not 0.
    place = torch.searchsorted(cumulated, uniform * total)
    return place if order is None else order.gather(-1, place)


def draw(seed: int, batch: int, num_tokens: int) -> Tensor:
    """Uniform numbers in (0, 1], [batch, num_tokens] float64; a row is a stream of its own, whatever their number."""
    seeds = torch.Generator().manual_seed(seed)
    generators = [torch.Generator().manual_seed(_next_seed(seeds)) for _ in range(batch)]
    return torch.stack([1 - torch.rand(num_tokens, dtype=torch.float64, generator=g) for g in generators])


def _next_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator))


def inference_copy(model: GPT) -> GPT:
    """A copy whose parameters are cast to activation_dtype once, so that casting them at each use does nothing.

    Gates stay as they are: their sigmoid is taken before the cast.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if not name.endswith(("gate", "gates")):
            parameter.data = parameter.data.to(model.activation_dtype)
    return model


def packed_is_faster(model: GPT, batch: int) -> bool:
    """Whether this machine multiplies `batch` rows by packed int6 matrices faster than by dense ones."""
    on_cpu = model.tok_emb.weight.device.type == "cpu" and extension.WHY_NOT_CPU is None
    return on_cpu and (batch <= PACKED_MAX_ROWS or model.activation_dtype == torch.float32)


def capture_cuda_graph(step: Callable[[], None]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class _Replayed:
    """A step that is captured once per window of the cache and replayed from then on.

    The first step of a window runs as it is: kernels are compiled and libraries initialised before a capture.
    """

    def __init__(self, step: Callable[[], None], cache: KVCache, capture: Capture) -> None:
        self._step, self._cache, self._capture = step, cache, capture
        self._replay: Callable[[], object] = step

    def __call__(self) -> None:
        cache, num_tokens = self._cache, self._cache.num_tokens + 1
        window = -(-num_tokens // WINDOW) * WINDOW
        if cache.window == window:
            self._replay()
        else:
            cache.window = window
            self._step()
            try:
                self._replay = self._capture(self._step)
            except RuntimeError as error:
                logging.getLogger("pgolf").warning("generate: steps run uncaptured (%s)", error)
                self._replay = self._step
        cache.num_tokens = num_tokens  # a replay does not count, a capture does


def _check(
    vocab_size: int,
    device: torch.device,
    prompt: Tensor,
    num_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> None:
    def must(condition: bool, text: str) -> None:
        if not condition:
            raise InputError(f"generate: {text}")

    described = f"{prompt.dtype} {tuple(prompt.shape)} on {prompt.device}"
    ok = prompt.dtype == torch.int64 and prompt.dim() == 2 and prompt.numel() > 0 and prompt.device == device
    must(ok, f"prompt must be int64 [B, T0] on {device}, with a token at least in each row, got {described}")
    low, high = (int(t) for t in prompt.aminmax())
    must(low >= 0 and high < vocab_size, f"tokens must lie in 0..{vocab_size - 1}, got {low}..{high}")
    must(num_tokens >= 1, f"num_tokens must be at least 1, got {num_tokens}")
    must(0 <= temperature < float("inf"), f"temperature must be a finite number, at least 0, got {temperature}")
    must(top_k >= 0, f"top_k must be at least 0 (no limit), got {top_k}")
    must(0 < top_p <= 1, f"top_p must lie in (0, 1], got {top_p}")
    must(0 <= seed < 2**63, f"seed must lie in 0..2**63 - 1, got {seed}")
