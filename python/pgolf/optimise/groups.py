"""Which optimiser owns which parameter: Muon the banks of matrices, AdamW the embedding tables and everything small."""

import torch
from torch import Tensor, nn

from pgolf_kernels.optim import Muon

from ..config import Config

MUON_PARAMETERS = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")
PROJECTIONS = ("bigram.proj.weight", "ve_shared.proj.weight")  # Muon's too, if the config says so
EMBEDDING_TABLES = ("tok_emb.weight", "bigram.embed.weight", "ve_shared.embed.weight")


class Optimisers:
    """Muon and AdamW stepped together; `base_lr` of each group times the schedule's multiplier is its learning rate.

    Args:
        compute_dtype: of Muon's orthogonalisation.
        process_group: ranks that share Muon's work as cfg.muon_comms says; None: this process does all of it.
    """

    def __init__(self, model: nn.Module, cfg: Config, compute_dtype: torch.dtype, process_group=None):
        named = dict(model.named_parameters())
        self.names = list(named)
        owned = MUON_PARAMETERS + (PROJECTIONS if cfg.muon_projections else ())
        self.muon_names = tuple(n for n in owned if n in named)
        matrices = [named[n] for n in self.muon_names]
        tables = [p for n, p in named.items() if n in EMBEDDING_TABLES]
        scalars = [p for n, p in named.items() if n not in self.muon_names and n not in EMBEDDING_TABLES]
        self.muon = Muon(
            matrices,
            lr=cfg.matrix_lr,
            momentum=cfg.muon_momentum,
            weight_decay=cfg.muon_wd,
            nesterov=True,
            ns_steps=cfg.muon_steps,
            ns_coefficients=cfg.muon_coefficients,
            row_normalize=cfg.muon_row_normalize,
            compute_dtype=compute_dtype,
            process_group=process_group,
            comms=cfg.muon_comms,
            reduction="sum",  # the loss is already divided by the tokens of all ranks
            momentum_dtype=getattr(torch, cfg.muon_momentum_dtype),
        )
        self.reduced_here = matrices if self.muon.reduces_gradients else []  # ranks give their own gradients of these
        self.adamw = torch.optim.AdamW(
            [
                {"params": tables, "lr": cfg.tied_embed_lr, "weight_decay": cfg.embed_wd},
                {"params": scalars, "lr": cfg.scalar_lr, "weight_decay": cfg.adam_wd},
            ],
            betas=(cfg.beta1, cfg.beta2),
            eps=cfg.adam_eps,
            fused=True,
        )
        self._named = named
        for group in self._groups():
            group["base_lr"] = group["lr"]

    def _groups(self) -> list[dict]:
        return self.muon.param_groups + self.adamw.param_groups

    def step(self, lr_multiplier: float, momentum: float) -> None:
        for group in self._groups():
            group["lr"] = group["base_lr"] * lr_multiplier
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        self.muon.reduce_gradients()  # on their way while AdamW steps
        self.adamw.step()
        self.muon.step()

    def state_tensors(self) -> dict[str, Tensor]:
        """Optimiser state as name -> tensor, e.g. `qo_bank.momentum_buffer`. Every rank calls it; rank 0 has it all."""
        state = {}
        for index, momentum in self.muon.full_state_dict()["state"].items():
            state |= {f"{self.muon_names[index]}.{key}": value for key, value in momentum.items()}
        for name, p in self._named.items():
            state |= {f"{name}.{key}": value for key, value in self.adamw.state.get(p, {}).items()}
        return state

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """The inverse of state_tensors, on the device of each parameter (fused AdamW keeps its step counter there)."""
        own: dict[str, dict[str, Tensor]] = {name: {} for name in self._named}
        for key, value in state.items():
            name, _, kind = key.rpartition(".")
            own[name][kind] = value
        muon = self.muon.state_dict()
        muon["state"] = {index: own[name] for index, name in enumerate(self.muon_names) if own[name]}
        self.muon.load_state_dict(muon)
        for name, p in self._named.items():
            if name not in self.muon_names:
                self.adamw.state[p] = {key: value.to(p.device, copy=True) for key, value in own[name].items()}

    def reset(self) -> None:
        """Forget all state, as if no step had been taken."""
        self.muon.state.clear()
        self.adamw.state.clear()
