"""A residual network in the Trainer, and the same run with the table's numbers written into module and optimizer."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader

from helpers.parameter_groups import ADAM_LR, EPS, MULTIPLIERS, D, L, M
from helpers.trainers import pairs, quiet
from mlu_lightning.application.state_mark import without_mark
from mlu_lightning.models import ResidualBlock

Residual = Literal["hook", "fold"]

# The shape is L, M and D times the base's
BASE = (2, 4, 4)
SHAPE = (round(2 * L), round(4 * M), round(4 * D))
ROLES = {"embed": "embedding", "read": "branch_in", "write": "branch_out", "readout": "readout"}


class Net(LightningModule):  # trains with AdamW, and keeps what it lost and what it was validated with
    def __init__(self, shape: tuple[int, int, int] = SHAPE) -> None:
        super().__init__()
        self.lr, self.batch_size, self.branch, self.head = 0.02, 4, 1.0, 1.0
        self.losses: list[float] = []
        self.validated: list[float] = []
        self.shape = shape
        self.build()

    def build(self) -> None:
        depth, hidden, embedding = self.shape
        with isolate_rng():
            torch.manual_seed(7)
            self.embed = nn.Linear(3, embedding, bias=False)
            self.blocks = nn.ModuleList(ResidualBlock(hidden, embedding) for _ in range(depth))
            self.readout = nn.Linear(embedding, 2, bias=False)

    @property
    def backbone(self) -> nn.Module:
        return self.blocks

    def forward(self, x: Tensor) -> Tensor:
        stream = self.embed(x)
        for block in self.blocks:
            stream = stream + self.branch * block(stream)
        return self.head * self.readout(stream)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def validation_step(self, batch: list[Tensor]) -> None:
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("val_loss", loss)
        self.validated.append(float(loss))

    def train_dataloader(self) -> DataLoader[Any]:
        return data(0, self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return data(1, 8)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])
        return [optimizer], [optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    def optimizer(self, parameters: list[nn.Parameter]) -> optim.AdamW:
        return optim.AdamW(parameters, lr=self.lr, eps=1e-3, weight_decay=0.1)


class ByHand(Net):  # with multipliers in its forward pass, or in its weights, and the numbers for them in its optimizer
    def __init__(self, residual: Residual) -> None:
        super().__init__()
        self.residual = residual
        if residual == "hook":
            self.branch, self.head = MULTIPLIERS["branch_out"], MULTIPLIERS["readout"]

    def optimizer(self, parameters: list[nn.Parameter]) -> optim.AdamW:
        factors = {}
        for name, parameter in self.named_parameters():
            role = ROLES[name.split(".")[-2]]
            a = MULTIPLIERS.get(role, 1.0) if self.residual == "fold" else 1.0
            factors[parameter] = ADAM_LR[role] * a, EPS[role] / a
        return AdamWByHand(factors, parameters, lr=self.lr, eps=1e-3, weight_decay=0.1)


class AdamWByHand(optim.AdamW):  # updates each parameter alone, with its own factors of the lr and eps in its group
    def __init__(self, factors: dict[nn.Parameter, tuple[float, float]], parameters: Any, **numbers: float) -> None:
        super().__init__(parameters, **numbers)
        self.factors = factors

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                lr, eps = self.factors[parameter]
                numbers = {"eps": group["eps"] * eps, "weight_decay": group["weight_decay"] / lr}
                alone = optim.AdamW([parameter], group["lr"] * lr, betas=group["betas"], **numbers)
                alone.state[parameter] = self.state[parameter]
                alone.step()
        return loss


def data(seed: int, batch_size: int) -> DataLoader[Any]:
    return DataLoader(pairs(24, seed), batch_size)


class Start(Callback):  # keeps the weights that training starts from
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights = {name: value.clone() for name, value in without_mark(pl_module.state_dict()).items()}


def fit(module: LightningModule, *callbacks: Callback, **settings: Any) -> Trainer:
    torch.manual_seed(3)
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = quiet(*callbacks, **{"max_epochs": 4, **settings})
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


def listed(value: Any) -> Any:
    """A value with lists in the place of its tensors, so that two can be compared."""
    if isinstance(value, dict):
        return {key: listed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [listed(item) for item in value]
    return value.tolist() if isinstance(value, Tensor) else value
