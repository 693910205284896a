"""Training against the artifact's grid: late in a run the forward multiplies by matrices as they will be packed.

"hard" rounds to the nearest code and passes the gradient through as if it had not (straight-through); "soft" replaces
the step of rounding by a sigmoid that sharpens over 500 steps. Bits, floor and clip are the artifact's, by kind of
matrix; the clip is a row's largest value where packing would search for one. The surprise: the published systems
switched this by a flag on a class, which torch.compile had folded into the graph as off, so that none of them trained
so. Here both graphs are compiled before the clock (Trainer.warm_up).
Sources: openai/parameter-golf #1128, #675 (hard), #1217 (soft); arXiv 1308.3432 (straight-through).
"""

import torch
from torch import Tensor

from pgolf_kernels.ops.int6_linear import reference

from ..artifact.quantise import Rounding, tensor_kind
from ..config import Config
from ..model import BANKS, published_names

RAMP_STEPS = 500  # steps over which soft rounding sharpens from 1 to 16
SHARPEST = 16.0


class FakeQuantiser:
    """Stands between a bank and the forward, as GPT.fake_quantise. Matrices that stay float16 are left alone.

    Args:
        shapes: of the model's export, by published name.
        device: the model's.
    """

    def __init__(self, cfg: Config, shapes: dict[str, tuple[int, ...]], device: torch.device):
        self.soft, self.start = cfg.qat == "soft", cfg.qat_start
        self.since: int | None = None  # the first step that was quantised
        self.sharpness = torch.ones((), device=device)  # a tensor: a number would be a constant of the graph
        self.roundings: dict[str, Rounding] = {}
        for bank in BANKS:
            name = published_names(bank, cfg.num_layers)[0]
            kind = tensor_kind(cfg, name, shapes[name])
            if kind != "float16":
                self.roundings[bank] = Rounding.of(cfg, kind)

    def active_at(self, step: int, lr_multiplier: float) -> bool:
        """Whether training step `step`, from 0, multiplies by rounded matrices; once one does all later ones do."""
        if self.since is None and lr_multiplier < self.start:
            self.since = step
        if self.since is None:
            return False
        if self.soft:
            self.sharpness.fill_(1 + (SHARPEST - 1) * min((step - self.since) / RAMP_STEPS, 1.0))
        return True

    def __call__(self, bank: str, weights: Tensor) -> Tensor:
        """weights: float32 [matrices, N, K]. Returns what the forward multiplies by instead."""
        if bank not in self.roundings:
            return weights
        how = self.roundings[bank]
        w = weights.flatten(0, 1)  # (matrices * N, K)
        clip = "max" if isinstance(how.clip, str) else how.clip
        scale = reference.candidate_scales(w.detach(), clip, how.floor, how.code_max)[0]
        step = scale.to(w.dtype)[:, None]
        if self.soft:
            z = w / step
            below = z.detach().floor()
            codes = below + torch.sigmoid(self.sharpness * (z - below - 0.5))
            rounded = codes.clamp(-how.code_max, how.code_max) * step
        else:
            rounded = reference.round_to_codes(w.detach(), scale, how.code_max) * step
            rounded = rounded + (w - w.detach())  # adds nothing but the gradient
        return rounded.view_as(weights)
