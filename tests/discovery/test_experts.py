"""Mixtures of experts: how many a token is sent to, and whether their outputs are averaged or summed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from helpers.architectures import LANGUAGE, VOCABULARY
from helpers.architectures.language import mixtral
from helpers.residual_networks import Net
from torch import Tensor, nn

from mlu_lightning import Plan, discover, fold

EMBEDDING, UNITS, EXPERTS, CHOSEN = 32, 24, 4, 2
X = torch.linspace(-1, 1, 80).reshape(16, 5)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_however_experts_are_computed(implementation: str) -> None:
    expected, found = (discover(mixtral(each)(2, 4, EMBEDDING), LANGUAGE) for each in ("batched_mm", implementation))
    assert (found.parameters, found.branches) == (expected.parameters, expected.branches)


def _hugging_face(name: str, **numbers: Any) -> nn.Module:
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": CHOSEN}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY, hidden_size=EMBEDDING, **special, **sizes, **numbers
    )
    return transformers.AutoModelForCausalLM.from_config(config)


_FEW = {"num_local_experts": EXPERTS, "intermediate_size": UNITS}
_MANY = {"num_experts": EXPERTS, "moe_intermediate_size": UNITS, "head_dim": 8}
_DEEPSEEK = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "moe_intermediate_size": UNITS, "n_group": 2}
_DEEPSEEK |= {"first_k_dense_replace": 1, "topk_group": 1, "kv_lora_rank": 12, "q_lora_rank": 16}
_DEEPSEEK |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}


@pytest.mark.parametrize(
    ("name", "numbers", "averaged", "experts"),
    [
        ("Qwen3Moe", _MANY | {"norm_topk_prob": True}, True, "mlp.experts"),
        ("Qwen3Moe", _MANY | {"norm_topk_prob": False}, False, "mlp.experts"),
        ("Olmoe", {"num_experts": EXPERTS, "intermediate_size": UNITS}, False, "mlp.experts"),
        ("GptOss", _FEW | {"head_dim": 8}, True, "mlp.experts"),  # softmax over the logits of those that are chosen
        ("GraniteMoe", _FEW, True, "block_sparse_moe.experts"),
        ("Phimoe", _FEW, False, "mlp.experts"),  # each of the two has its own softmax
        ("DeepseekV3", _DEEPSEEK, True, "mlp.experts"),  # chosen without a gradient, with a bias that is a buffer
        ("Qwen2Moe", _MANY | {"shared_expert_intermediate_size": 40}, False, "mlp.experts"),
    ],
)
def test_hugging_face_experts(name: str, numbers: dict[str, Any], averaged: bool, experts: str) -> None:
    structure = discover(_hugging_face(name, **numbers), LANGUAGE)
    assert not structure.unassigned and not structure.warnings
    read = structure.parameters[f"model.layers.1.{experts}.gate_up_proj"]
    write = structure.parameters[f"model.layers.1.{experts}.down_proj"]
    together = 1 if averaged else CHOSEN  # experts that are one hidden layer
    assert (read.role, read.fan_in, read.fan_out) == ("branch_in", EMBEDDING, 2 * UNITS * together)
    assert (write.role, write.fan_in, write.fan_out) == ("branch_out", UNITS * together, EMBEDDING)
    assert read.active == write.active == (CHOSEN if averaged else 1)
    assert write.branch is not None
    assert structure.branches[write.branch].hidden == CHOSEN * UNITS
    names = [name for name in structure.roles if name.endswith((".gate.weight", ".router.weight"))]
    assert {structure.roles[name] for name in names if "layers.1." in name} == {"branch_bounded_matrix"}
    # everything outside of the experts, such as experts that are always on, averages over nothing
    assert {facts.active for facts in structure.parameters.values() if ".experts." not in facts.name} == {1}


def test_experts_that_are_always_on_are_a_branch_beside_the_others() -> None:
    structure = discover(_hugging_face("Qwen2Moe", **_MANY, shared_expert_intermediate_size=40), LANGUAGE)
    found = [(b.name, b.hidden, b.position, str(b.site)) for b in structure.branches if b.kind == "mlp"]
    assert found[:2] == [
        ("model.layers.0.mlp", 2 * UNITS, 1, "model.layers.0.mlp.experts output"),
        ("model.layers.0.mlp.shared_expert", 40, 1, "model.layers.0.mlp.shared_expert output"),
    ]
    gate = structure.parameters["model.layers.0.mlp.shared_expert_gate.weight"]
    assert (gate.role, gate.fan_out, gate.active) == ("branch_bounded_matrix", 1, 1)


def test_biases_of_experts() -> None:
    structure = discover(_hugging_face("GptOss", **_FEW, head_dim=8), LANGUAGE)
    experts = (structure.parameters[f"model.layers.0.mlp.experts.{part}_proj_bias"] for part in ("gate_up", "down"))
    found = [(facts.role, facts.fan_in, facts.fan_out, facts.active) for facts in experts]
    assert found == [("branch_in_bias", 1, 2 * UNITS, CHOSEN), ("branch_out_bias", 1, EMBEDDING, CHOSEN)]
    assert structure.roles["model.layers.0.mlp.router.bias"] == "branch_bounded"


class Mixture(nn.Module):
    """One residual block of experts, put together by ``mix``, a function of the module and the stream."""

    def __init__(self, mix: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.mix = mix
        self.embed, self.out = nn.Linear(5, EMBEDDING), nn.Linear(EMBEDDING, 3)
        self.router = nn.Linear(EMBEDDING, EXPERTS, bias=False)
        self.read = nn.ModuleList(nn.Linear(EMBEDDING, UNITS) for _ in range(EXPERTS))
        self.write = nn.ModuleList(nn.Linear(UNITS, EMBEDDING) for _ in range(EXPERTS))
        self.mixture = nn.Identity()

    def expert(self, i: int, h: Tensor) -> Any:
        return self.write[i](torch.tanh(self.read[i](h)))

    def weighted(self, weights: Tensor, h: Tensor) -> Tensor:
        return (weights[..., None] * torch.stack([self.expert(i, h) for i in range(EXPERTS)], 1)).sum(1)

    def forward(self, x: Tensor) -> Any:
        h = self.embed(x)
        return self.out(h + self.mixture(self.mix(self, h)))


def loop(net: Mixture, h: Tensor) -> Tensor:
    """Each expert computes the tokens that are sent to it; the last one of the four never gets any."""
    logits = net.router(h) - torch.tensor([0.0, 0.0, 0.0, 1e9])
    weights, chosen = torch.topk(logits.softmax(-1), CHOSEN, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    output = torch.zeros_like(h)
    for i in range(EXPERTS):
        tokens, place = torch.where(chosen == i)
        if len(tokens):
            output.index_add_(0, tokens, net.expert(i, h[tokens]) * weights[tokens, place, None])
    return output


def averaged(net: Mixture, h: Tensor) -> Tensor:
    return net.weighted(net.router(h).softmax(-1), h)


def masked(net: Mixture, h: Tensor) -> Tensor:
    """The logits of those that are not chosen are masked: the graph does not show how many these are."""
    logits = net.router(h)
    least = logits.detach().topk(CHOSEN, -1).values[..., -1:]
    return net.weighted(logits.masked_fill(logits < least, float("-inf")).softmax(-1), h)


def best(net: Mixture, h: Tensor) -> Tensor:
    weight, chosen = net.router(h).softmax(-1).max(-1, keepdim=True)
    return torch.stack([weight * (chosen == i) * net.expert(i, h) for i in range(EXPERTS)]).sum(0)


class Product(nn.Module):  # experts in one parameter, with biases, and weights in one product
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(5, EMBEDDING), nn.Linear(EMBEDDING, 3)
        self.router = nn.Linear(EMBEDDING, EXPERTS, bias=False)
        self.read, self.bias, self.write = (
            nn.Parameter(torch.randn(EXPERTS, *shape)) for shape in ((EMBEDDING, UNITS), (UNITS,), (UNITS, EMBEDDING))
        )

    def weights(self, h: Tensor, squash: Callable[[Tensor], Tensor]) -> Tensor:
        best, chosen = self.router(h).topk(CHOSEN, -1)
        return torch.zeros(len(h), EXPERTS).scatter(1, chosen, squash(best))

    def forward(self, x: Tensor) -> Any:
        h = self.embed(x)
        units = nn.functional.gelu(torch.einsum("nd,edm->enm", h, self.read) + self.bias[:, None])
        made = torch.einsum("enm,emd->end", units, self.write)
        return self.out(h + torch.einsum("ne,end->nd", self.weights(h, lambda best: best.softmax(-1)), made))


class Weighted(Product):  # what experts are given is weighted, and not what they make
    def forward(self, x: Tensor) -> Any:
        h = self.embed(x)
        given = self.weights(h, torch.sigmoid).T[..., None] * h
        units = nn.functional.gelu(torch.einsum("end,edm->enm", given, self.read) + self.bias[:, None])
        return self.out(h + torch.einsum("enm,emd->end", units, self.write).sum(0))


def test_experts_whose_inputs_are_weighted() -> None:
    structure = discover(Weighted(), X)
    assert not structure.unassigned
    assert [branch.hidden for branch in structure.branches] == [CHOSEN * UNITS]
    roles = {
        "router.weight": "branch_bounded_matrix",
        "read": "branch_in",
        "bias": "branch_in_bias",
        "write": "branch_out",
    }
    assert {name: structure.roles[name] for name in roles} == roles
    assert {facts.active for facts in structure.parameters.values()} == {1}


@pytest.mark.parametrize(
    ("mix", "active", "hidden"),
    [(loop, 2, 2 * UNITS), (averaged, 4, 4 * UNITS), (best, 1, UNITS), (None, 2, 2 * UNITS)],
)
def test_plain_experts(mix: Callable[[Any, Tensor], Tensor] | None, active: int, hidden: int) -> None:
    structure = discover(Product() if mix is None else Mixture(mix), X)
    assert not structure.unassigned
    assert [branch.hidden for branch in structure.branches] == [hidden]
    names = ("read", "write", "bias") if mix is None else ("read.2.weight", "write.2.weight", "read.2.bias")
    facts = [structure.parameters[name] for name in names]
    expected = [("branch_in", EMBEDDING, UNITS), ("branch_out", UNITS, EMBEDDING), ("branch_in_bias", 1, UNITS)]
    assert [(f.role, f.fan_in, f.fan_out) for f in facts] == expected
    assert {f.active for f in facts} == {active}
    assert structure.roles["router.weight"] == "branch_bounded_matrix"


def test_experts_without_tokens_are_planned_and_folded_as_those_beside_them() -> None:
    module, base = Mixture(loop), Mixture(loop)
    structure = discover(module, X)
    (warning,) = structure.warnings
    idle = ["read.3.weight", "read.3.bias", "write.3.weight", "write.3.bias"]
    assert warning.startswith("experts that no token of the example was sent to") and warning.endswith(", ".join(idle))
    for name in idle:
        beside, facts = structure.parameters[name.replace("3", "1")], structure.parameters[name]
        assert (facts.name, facts.role, facts.active, facts.branch) == (name, beside.role, 2, beside.branch)
    (branch,) = structure.branches
    assert [*branch.folds] == [f"write.{i}.{part}" for i in range(EXPERTS) for part in ("weight", "bias")]
    before = [module.write[i].weight.clone() for i in range(EXPERTS)]
    plan = Plan.from_model(module, X, base=base, alpha=0.5)
    folded = fold(module, plan)
    for i in range(EXPERTS):
        torch.testing.assert_close(folded.get_parameter(f"write.{i}.weight"), before[i] * 0.5, rtol=1e-6, atol=0)


def test_experts_without_tokens_belong_to_their_own_block() -> None:
    """Of two blocks of experts, whose names end in numbers, the last and the one before it never get a token."""

    def forward(net: Net, x: Tensor) -> Any:
        h = net.embed(x)
        for idle, block in zip((3, 2), net.blocks, strict=True):
            weights = block["router"](h).softmax(-1)
            busy = [i for i in range(EXPERTS) if i != idle]
            h = h + torch.stack([block[f"expert_{i}"](h) * weights[:, i : i + 1] for i in busy]).sum(0)
        return net.out(h)

    def block() -> nn.ModuleDict:
        experts = (nn.Sequential(nn.Linear(8, UNITS), nn.Tanh(), nn.Linear(UNITS, 8)) for _ in range(EXPERTS))
        named = {f"expert_{i}": expert for i, expert in enumerate(experts)}
        return nn.ModuleDict({"router": nn.Linear(8, EXPERTS)} | named)

    structure = discover(Net(forward, blocks=nn.ModuleList((block(), block()))), X[:, :3])
    assert not structure.unassigned
    for number, branch in enumerate(structure.branches):
        facts = structure.parameters[f"blocks.{number}.expert_{3 - number}.2.weight"]
        assert (facts.role, facts.branch) == ("branch_out", number)
        assert facts.name in branch.folds and facts.name in branch.parameters


def test_a_number_of_experts_that_cannot_be_read_is_said() -> None:
    structure = discover(Mixture(masked), X)
    (warning,) = structure.warnings
    assert warning.startswith("the number of experts that a token is sent to cannot be read in the graph")
    assert [branch.hidden for branch in structure.branches] == [UNITS]
    assert structure.parameters["write.2.weight"].active == 1
