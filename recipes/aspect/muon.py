"""A Transformer whose branches are trained by Muon, and everything else by AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlu_lightning.models import CausalTransformer


class MuonTransformer(CausalTransformer):
    """``CausalTransformer``, whose branches' matrices Muon trains, at AdamW's learning rate and size of updates."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor) -> Tensor:
        """A step of both, which counts once."""
        loss = super().training_step(batch)
        muon, adamw = self.optimizers()
        muon.zero_grad(), adamw.zero_grad()
        self.manual_backward(loss)
        adamw.optimizer.step()
        muon.step()
        for schedule in self.lr_schedulers():
            schedule.step()
        return loss

    def configure_optimizers(self) -> Any:
        """Muon and AdamW, with one schedule."""
        matrices = [p for p in self.branches.parameters() if p.ndim == 2]
        own = {id(p) for p in matrices}
        others = [p for p in self.parameters() if id(p) not in own]
        muon = torch.optim.Muon(matrices, self.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(others, self.lr, self.betas, self.eps, weight_decay=0.0)
        schedule = super().configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas[0]
        return [muon, adamw], [torch.optim.lr_scheduler.LambdaLR(one, schedule) for one in (muon, adamw)]
