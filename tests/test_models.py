import numpy as np
import pytest
import torch
from helpers.trainers import quiet
from torch.nn import functional as F
from torch.utils.data import DataLoader

from mlu_lightning import Plan, attach_multipliers, scale_optimizer
from mlu_lightning.models import CausalTransformer, ResNet

DEPTH, HIDDEN, EMBEDDING, INPUTS, OUTPUTS = 3, 12, 7, 4, 2


@pytest.mark.parametrize("activation", ["tanh", "positive"])
def test_resnet_in_the_absolute_form_is_the_papers_with_its_gradient_step(activation: str) -> None:
    """theory.md, section 2, in NumPy: U and V with entries N(0, D), learning rate 1 on everything, one step."""
    rng = np.random.default_rng(0)
    tanh, linear = (np.tanh, lambda p: 1 - np.tanh(p) ** 2), (lambda p: p, np.ones_like)
    sigma, slope = tanh if activation == "tanh" else linear
    w_e, w_u = rng.normal(size=(EMBEDDING, INPUTS)), rng.normal(size=(EMBEDDING, OUTPUTS))
    u, v = (rng.normal(size=(DEPTH, EMBEDDING, HIDDEN)) * EMBEDDING**0.5 for _ in range(2))
    x, y = rng.normal(size=(INPUTS, 5)), rng.normal(size=(OUTPUTS, 5))

    module = ResNet(DEPTH, HIDDEN, EMBEDDING, INPUTS, OUTPUTS, activation=activation).double()
    with torch.no_grad():
        module.embed.weight.copy_(torch.from_numpy(w_e))
        module.readout.weight.copy_(torch.from_numpy(w_u.T))
        for block, u_l, v_l in zip(module.blocks, u, v, strict=True):
            block.read.weight.copy_(torch.from_numpy(u_l.T / EMBEDDING))
            block.write.weight.copy_(torch.from_numpy(v_l / HIDDEN))
    plan = Plan.from_model(module)
    attach_multipliers(module, plan)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    scale_optimizer(optimizer, module, plan)
    output = module(torch.from_numpy(x.T))
    (0.5 * (output - torch.from_numpy(y.T)).square().sum()).backward()
    optimizer.step()

    stream, hidden = [w_e @ x], []
    for u_l, v_l in zip(u, v, strict=True):
        hidden.append(u_l.T @ stream[-1] / EMBEDDING)
        stream.append(stream[-1] + v_l @ sigma(hidden[-1]) / (DEPTH * HIDDEN))
    f = w_u.T @ stream[-1] / EMBEDDING
    np.testing.assert_allclose(output.detach().numpy().T, f, rtol=1e-12)

    error = f - y
    b = w_u @ error  # D times the gradient with respect to the stream
    new_u, new_v = np.empty_like(u), np.empty_like(v)
    for i in reversed(range(DEPTH)):
        q = v[i].T @ b / EMBEDDING
        new_u[i] = u[i] - stream[i] @ (slope(hidden[i]) * q).T
        new_v[i] = v[i] - b @ sigma(hidden[i]).T
        b = b + u[i] @ (slope(hidden[i]) * q) / (DEPTH * HIDDEN)
    for block, u_l, v_l in zip(module.blocks, new_u, new_v, strict=True):
        np.testing.assert_allclose(block.read.weight.detach().numpy(), u_l.T / EMBEDDING, rtol=1e-11)
        np.testing.assert_allclose(block.write.weight.detach().numpy(), v_l / HIDDEN, rtol=1e-11)
    np.testing.assert_allclose(module.readout.weight.detach().numpy().T, w_u - stream[-1] @ error.T, rtol=1e-11)
    np.testing.assert_allclose(module.embed.weight.detach().numpy(), w_e - b @ x.T, rtol=1e-11)


def test_resnet_with_frozen_embeddings_trains_its_blocks_alone() -> None:
    module = ResNet(2, 8, 4, inputs=3, outputs=2, train_embedding=False)
    assert {name for name, p in module.named_parameters() if not p.requires_grad} == {"embed.weight", "readout.weight"}
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    quiet(max_epochs=2).fit(module, DataLoader([(torch.randn(3), torch.randn(2)) for _ in range(8)], batch_size=4))
    assert all(torch.equal(p, before[name]) is not p.requires_grad for name, p in module.named_parameters())


@pytest.mark.parametrize("activation", ["no_such_function", "cross_entropy", "sum"])
def test_resnet_with_an_activation_that_is_none(activation: str) -> None:
    with pytest.raises(ValueError, match=f"activation='{activation}' is not the name of a function.*such as 'tanh'"):
        ResNet(2, 8, 4, inputs=3, outputs=2, activation=activation)


def test_transformer_sees_the_past_alone() -> None:
    torch.manual_seed(0)
    module = CausalTransformer(11, 16, depth=2, embedding=24, heads=2, head_dim=8)
    tokens = torch.randint(11, (3, 16))
    other = tokens.clone()
    other[:, 9:] = torch.randint(11, (3, 7))
    torch.testing.assert_close(module(other)[:, :9], module(tokens)[:, :9], rtol=0, atol=1e-6)
    assert not torch.allclose(module(other)[:, 9:], module(tokens)[:, 9:])


def test_transformer_tells_places_apart() -> None:
    """Without positions, the last token's logits would not depend on the order of those before it."""
    torch.manual_seed(0)
    module = CausalTransformer(11, 8, depth=1, embedding=24, heads=2, head_dim=8)
    tokens = torch.tensor([[1, 2, 3, 4]])
    assert not torch.allclose(module(tokens)[:, -1], module(tokens[:, [1, 0, 2, 3]])[:, -1])


def test_transformer_of_any_heads_and_embedding() -> None:
    module = CausalTransformer(11, 8, depth=2, embedding=20, heads=3, head_dim=16, mlp_hidden=50)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    names = "branches.0.query", "branches.0.out", "branches.1.read", "readout"
    assert [shapes[f"{name}.weight"] for name in names] == [(48, 20), (20, 48), (50, 20), (11, 20)]
    with pytest.raises(ValueError, match="head_dim"):
        CausalTransformer(11, 8, depth=2, embedding=20, heads=3, head_dim=15)


def test_transformer_learns_and_is_loaded_from_its_checkpoint(tmp_path: object) -> None:
    torch.manual_seed(0)
    module = CausalTransformer(5, 8, depth=1, embedding=16, heads=1, lr=1e-2, schedule_steps=60)
    trainer, tokens = quiet(max_epochs=1), torch.arange(5)

    def loss() -> float:
        return F.cross_entropy(module(tokens[None])[0], (tokens + 1) % 5).item()

    before = loss()
    trainer.fit(module, DataLoader([(torch.arange(9) + i) % 5 for i in range(240)], batch_size=4))
    assert loss() < 0.2 * before, "counting modulo 5 is easy"
    assert trainer.optimizers[0].param_groups[0]["lr"] < 1e-3, "the schedule ends near zero"
    trainer.save_checkpoint(f"{tmp_path}/model.ckpt")
    loaded = CausalTransformer.load_from_checkpoint(f"{tmp_path}/model.ckpt")
    assert torch.equal(loaded(tokens[None]), module(tokens[None]))
