"""Networks of kinds that only some people write, their Adam's and SGD's learning rates by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from mlu_lightning import Plan

BATCH = torch.arange(15.0).sin().reshape(5, 3)


class Kernel(nn.Module):  # of each channel, computed from complex numbers: a diagonal state space
    def __init__(self, width: int) -> None:
        super().__init__()
        self.states, self.decay = nn.Parameter(torch.randn(width, 2, 2)), nn.Parameter(torch.rand(width, 2))
        self.write = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        powers = ((1j * torch.pi - self.decay)[..., None] * torch.arange(5)).exp()
        states = torch.view_as_complex(self.states) * (powers[..., 1] - 1) / self.decay
        kernel = torch.einsum("dn,dnt->dt", states, powers).real
        mixed: Tensor = torch.fft.irfft(torch.fft.rfft(h.T, 10) * torch.fft.rfft(kernel, 10), 10)
        return self.write(F.gelu(mixed[..., :5].T))


class Net(nn.Module):
    def __init__(self, inputs: int, outputs: int, depth: int, hidden: int, width: int) -> None:
        super().__init__()
        self.embed, self.readout = nn.Linear(inputs, width), nn.Linear(width, outputs)
        self.spread, self.time = nn.Linear(width, outputs), nn.Linear(width, width)
        blocks = [nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width)) for _ in range(depth)]
        self.blocks, self.kernels = nn.ModuleList(blocks), nn.ModuleList(Kernel(width) for _ in range(depth))

    def stream(self, h: Tensor, kernels: bool = False) -> Tensor:
        for block in self.kernels if kernels else self.blocks:
            h = h + block(h)
        return h

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.stream(self.embed(x)))


class Step(LightningModule):  # ``net`` maps data to two numbers, ``other`` these to data
    def __init__(self, loss: Callable[["Step", Tensor], Any], *shape: int) -> None:
        super().__init__()
        self.net, self.other, self.log_std = Net(3, 2, *shape), Net(2, 3, *shape), nn.Parameter(torch.zeros(2))
        self.loss, self.automatic_optimization = loss, loss is not adversarial

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters()) for part in (self.net, self.other)]

    def training_step(self, batch: Tensor) -> Any:
        return self.loss(self, batch)


def diffusion(step: Step, x: Tensor) -> Any:  # the time is embedded by sinusoids of as many entries as the stream has
    angles = x[:, :1] * torch.arange(step.net.time.in_features // 2)
    time = step.net.time(torch.cat([angles.sin(), angles.cos()], -1))
    return step.net.readout(step.net.stream(step.net.embed(x) + time)).square().mean()


def variational(step: Step, x: Tensor) -> Any:
    h = step.net.stream(step.net.embed(x))
    mean, log_variance = step.net.readout(h), step.net.spread(h)
    latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    return F.mse_loss(step.other(latents), x) + (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def adversarial(step: Step, x: Tensor) -> None:
    fake = step.other(x[:, :2])
    step.manual_backward(F.softplus(step.net(fake.detach())).mean() + F.softplus(-step.net(x)).mean())
    step.manual_backward(F.softplus(-step.net(fake)).mean())


def policy(step: Step, x: Tensor) -> Any:
    actions = torch.distributions.Normal(step.net(x), step.log_std.exp())
    return -actions.log_prob(x[:, :2]).mean() - 0.01 * actions.entropy().mean()


def equation(step: Step, x: Tensor) -> Any:  # with derivatives of outputs by inputs, twice
    x = x.clone().requires_grad_()
    first = torch.autograd.grad(step.net(x).sum(), x, create_graph=True)[0]
    return torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)[0].square().mean()


def state_space(step: Step, x: Tensor) -> Any:
    return step.net.readout(step.net.stream(step.net.embed(x), kernels=True)).square().mean()


# n and 1/g of parameters, at ratios to the base of depth l, hidden width m and stream d
KINDS: dict[Callable[[Step, Tensor], Any], str] = {
    diffusion: "net.time.weight d d, net.embed.weight 1 d, net.readout.weight 1 d",
    variational: "net.readout.weight d 1, net.spread.weight d 1, net.spread.bias 1 1, other.embed.weight 1 d",
    adversarial: "net.embed.weight 1 d, net.embed.bias 1 d, other.readout.weight d 1, net.readout.weight 1 d",
    policy: "log_std 1 1, net.readout.weight 1 d, net.readout.bias 1 1",
    equation: "net.blocks.0.0.weight d l*m, net.blocks.0.2.weight m l*d, net.readout.weight 1 d",
    state_space: "net.kernels.0.states 1 l*d, net.kernels.0.decay 1 l*d, net.kernels.0.write.weight d l*d",
}


@pytest.mark.parametrize("loss", KINDS)
def test_learning_rates(loss: Callable[[Step, Tensor], Any]) -> None:
    plan = Plan.from_model(Step(loss, 2 * 3, 2 * 5, 2 * 7), BATCH, base=Step(loss, 2, 2, 2))
    for name, *powers in map(str.split, KINDS[loss].split(",")):
        n, inverse_g = (eval(power, {"l": 3, "m": 5, "d": 7}) for power in powers)
        found = plan.scales("adamw")[name].lr, plan.scales("sgd")[name].lr
        assert found == pytest.approx((1 / n, inverse_g / n)), name
