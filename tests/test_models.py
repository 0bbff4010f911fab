import numpy as np
import pytest
import torch
from helpers.paper_network import POSITIVE, TANH, load, numpy_step
from helpers.trainers import quiet
from torch.nn import functional as F
from torch.utils.data import DataLoader

from mlu_lightning import Plan, attach_multipliers, scale_optimizer
from mlu_lightning.models import CausalTransformer, ResNet

DEPTH, HIDDEN, EMBEDDING, INPUTS, OUTPUTS = 3, 12, 7, 4, 2


@pytest.mark.parametrize("activation", ["tanh", "positive"])
def test_resnet_in_the_absolute_form_is_the_papers_with_its_gradient_step(activation: str) -> None:
    """U and V with entries N(0, D), learning rate 1 on everything, one step."""
    rng = np.random.default_rng(0)
    w_e, w_u = rng.normal(size=(EMBEDDING, INPUTS)), rng.normal(size=(EMBEDDING, OUTPUTS))
    u, v = (rng.normal(size=(DEPTH, EMBEDDING, HIDDEN)) * EMBEDDING**0.5 for _ in range(2))
    x, y = rng.normal(size=(INPUTS, 5)), rng.normal(size=(OUTPUTS, 5))
    shape = (DEPTH, HIDDEN, EMBEDDING, INPUTS, OUTPUTS)
    module, expected = (ResNet(*shape, activation=activation).double() for _ in range(2))
    load(module, u, v, w_e, w_u)
    plan = Plan.from_model(module)
    attach_multipliers(module, plan)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    scale_optimizer(optimizer, module, plan)
    output = module(torch.from_numpy(x.T))
    (0.5 * (output - torch.from_numpy(y.T)).square().sum()).backward()
    optimizer.step()
    found, *weights = numpy_step(u, v, w_e, w_u, x, y, {"tanh": TANH, "positive": POSITIVE}[activation])
    np.testing.assert_allclose(output.detach().numpy().T, found, rtol=1e-12)
    load(expected, *weights)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter, expected.get_parameter(name), rtol=1e-11, atol=0, msg=name)


def test_resnet_with_frozen_embeddings_trains_its_blocks_alone() -> None:
    module = ResNet(2, 8, 4, inputs=3, outputs=2, train_embedding=False)
    assert {name for name, p in module.named_parameters() if not p.requires_grad} == {"embed.weight", "readout.weight"}
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    data = DataLoader([(torch.randn(3), torch.randn(2)) for _ in range(8)], batch_size=4)
    quiet(max_epochs=2).fit(module, data)
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in module.named_parameters() if p.requires_grad}


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
    assert shapes["branches.0.query.weight"] == (48, 20) and shapes["branches.0.out.weight"] == (20, 48)
    assert shapes["branches.1.read.weight"] == (50, 20) and shapes["readout.weight"] == (11, 20)
    with pytest.raises(ValueError, match="head_dim"):
        CausalTransformer(11, 8, depth=2, embedding=20, heads=3, head_dim=15)


def test_transformer_learns_and_is_loaded_from_its_checkpoint(tmp_path: object) -> None:
    torch.manual_seed(0)
    module = CausalTransformer(5, 8, depth=1, embedding=16, heads=1, lr=1e-2, schedule_steps=60)
    data = DataLoader([(torch.arange(9) + i) % 5 for i in range(240)], batch_size=4)
    trainer = quiet(max_epochs=1)
    before = F.cross_entropy(module(torch.arange(5)[None])[0], (torch.arange(5) + 1) % 5)
    trainer.fit(module, data)
    after = F.cross_entropy(module(torch.arange(5)[None])[0], (torch.arange(5) + 1) % 5)
    assert after < 0.2 * before, "counting modulo 5 is easy"
    assert trainer.optimizers[0].param_groups[0]["lr"] < 1e-3, "the schedule ends near zero"
    trainer.save_checkpoint(f"{tmp_path}/model.ckpt")
    loaded = CausalTransformer.load_from_checkpoint(f"{tmp_path}/model.ckpt")
    assert torch.equal(loaded(torch.arange(5)[None]), module(torch.arange(5)[None]))
