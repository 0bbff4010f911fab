"""Factors tuned at the base: against runs whose numbers are set by hand, in files, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.optimizers_by_hand import CASES, ROWS, Case
from helpers.parameter_groups import Weights, plan_of
from helpers.trainers import identical, quiet
from helpers.updates import groups_of, train
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn, optim
from torch.utils.data import DataLoader

from mlu_lightning import MLUCallback, Plan, scale_optimizer
from mlu_lightning.models import CausalTransformer

TUNED = {
    "embedding": {"std": 4.0, "lr": 2.0},
    "branch_in@attention": {"lr": 0.5},
    "branch_out": {"multiplier": 0.25, "weight_decay": 2.0},
    "branch_out@mlp": {"std": 8.0},
    "readout": {"multiplier": 2.0, "lr": 4.0},
    "*.norm.weight": {"lr": 0.125},
}
TOKENS = torch.randint(11, (24, 9), generator=torch.Generator().manual_seed(0))


class Tied(CausalTransformer):
    """Its readout is its table, a checkpoint of which it can be trained without."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.readout.weight = self.tokens.weight


def built(depth: int = 1, heads: int = 2, embedding: int = 8, make: Any = CausalTransformer, **more: Any) -> Any:
    torch.manual_seed(0)
    return make(11, 8, depth, embedding, heads, head_dim=4, mlp_hidden=8 * heads, weight_decay=0.1, **more)


def fitted(module: LightningModule, *callbacks: Any) -> LightningModule:
    quiet(*callbacks, max_epochs=1).fit(module, DataLoader(TOKENS, batch_size=4))
    return module


class ByHand(CausalTransformer):
    """The base with the factors of ``TUNED`` in groups, weights and the forward pass, written out."""

    def configure_optimizers(self) -> Any:
        with torch.no_grad():
            self.tokens.weight *= 4
            self.branches[1].write.weight *= 8
        for branch in self.branches:
            branch.register_forward_hook(lambda module, args, output: output * 0.25)
        self.readout.register_forward_hook(lambda module, args, output: output * 2)
        groups = []
        for name, parameter in self.named_parameters():
            lr = {"tokens.weight": 2, "readout.weight": 4}.get(
                name, 0.125 if "norm" in name and "branches" in name else 1
            )
            lr = 0.5 if any(part in name for part in ("query", "key", "value")) else lr
            decay = 2 if "out.weight" in name or "write" in name else 1
            decay = 1 if name == "readout.weight" else decay
            numbers = {"lr": self.lr * lr, "weight_decay": self.weight_decay * decay}
            groups.append({"params": [parameter], **numbers})
        return optim.SGD(groups) if self.optimizer == "sgd" else optim.AdamW(groups, betas=self.betas, eps=self.eps)


@pytest.mark.parametrize("residual", ["hook", "fold"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_run_at_the_base_is_that_of_the_numbers_by_hand(residual: Any, optimizer: Any) -> None:
    tuned = {**TUNED}
    ours = built(optimizer=optimizer, lr=0.02)
    callback = MLUCallback(built(), tuned=tuned, residual=residual)
    fitted(ours, callback)
    theirs = fitted(built(make=ByHand, optimizer=optimizer, lr=0.02))
    ours.eval(), theirs.eval()
    assert torch.allclose(ours(TOKENS[:, :8]), theirs(TOKENS[:, :8]), rtol=1e-4, atol=1e-5)
    untuned = fitted(built(optimizer=optimizer, lr=0.02))
    assert not torch.allclose(untuned(TOKENS[:, :8]), theirs(TOKENS[:, :8]), rtol=0.1)


@pytest.mark.parametrize("parameterization", ["mlu", "completep", "mup", "sp"])
@pytest.mark.parametrize("make", [CausalTransformer, Tied])
def test_factors_are_multiplied_into_every_table(parameterization: str, make: Any) -> None:
    tuned = {key: value for key, value in TUNED.items() if make is CausalTransformer or key != "readout"}
    tuned |= {} if make is CausalTransformer else {"readout": {"multiplier": 2.0}}
    arguments: dict[str, Any] = {"base": built(make=make), "parameterization": parameterization}
    model, example = built(4, 4, 16, make), TOKENS[:4]
    plain, ours = (Plan.from_model(model, example, **arguments, tuned=each) for each in (None, tuned))
    for family in ("sgd", "adam", "adamw", "muon"):
        before, after = plain.scales(family), ours.scales(family)
        ratio = {
            name: tuple(getattr(after[name], key) / getattr(before[name], key) for key in ("std", "lr", "weight_decay"))
            for name in before
        }
        read, write = "branches.2.query.weight", "branches.3.write.weight"
        wanted = {"tokens.weight": (4, 2, 1), read: (1, 0.5, 1), write: (8, 1, 2), "norm.weight": (1, 1, 1)}
        assert {name: ratio[name] for name in wanted} == wanted
        assert ratio["branches.0.norm.weight"] == (1, 0.125, 1)
    factors = {m.kind: ours.forward_multiplier(m) / plain.forward_multiplier(m) for m in ours.multipliers}
    assert factors == {"branch": 0.25, "readout": 2.0}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rules_of_all_optimizers(case: Case) -> None:
    """A weight tuned in lr and std is one of a table whose row has these factors."""
    ours, theirs = Weights(case.names), Weights(case.names)
    tuned = {name: {"lr": 2.0, "std": 4.0} for name in case.names}
    plan = plan_of(ours)
    plan = replace(plan, parameters={n: replace(p, base_std=1.0) for n, p in plan.parameters.items()}, tuned=tuned)
    optimizer = case.optimizer(ours)
    scale_optimizer(optimizer, ours, plan)
    numbers = {key: value for key, value in case.optimizer(theirs).param_groups[0].items() if key != "params"}
    by_hand = case.make(groups_of(theirs, lambda name: {}), **case.numbers)
    for step in range(4):
        for group, name in zip(by_hand.param_groups, case.names, strict=True):
            row = ROWS[name]
            group.update(case.by_hand(numbers, row, step))
            plain = {**group}
            group.update(
                case.by_hand(
                    numbers, replace(row, adam=2 * row.adam, sgd=2 * row.sgd, muon=2 * row.muon, std=4 * row.std), step
                )
            )
            for key in ("weight_decay", "lambd"):
                if key in group and case.make is not optim.Adafactor:
                    group[key] = plain[key]
        train([step], (ours, optimizer), (theirs, by_hand), sparse=case.sparse)
    assert identical(ours, theirs)


def test_in_files_and_checkpoints(tmp_path: Any) -> None:
    path = tmp_path / "tuned.yaml"
    path.write_text("# found\nembedding: {lr: 2, std: 4e0}\n'branch_out@mlp': {multiplier: 0.5}\n")
    tuned = {"embedding": {"lr": 2.0, "std": 4.0}, "branch_out@mlp": {"multiplier": 0.5}}
    of_file, of_mapping = MLUCallback(built(), tuned=str(path)), MLUCallback(built(), tuned=tuned)
    ours, theirs = (fitted(built(2, 4, 16), callback) for callback in (of_file, of_mapping))
    assert identical(ours, theirs) and of_file.plan == of_mapping.plan
    plan = of_file.plan
    assert plan is not None and plan.tuned == tuned
    assert (
        "Tuned at the base, and in the numbers above: embedding lr 2, std 4; branch_out@mlp multiplier 0.5"
        in " ".join(str(plan).split())
    )
    plan.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml") == plan
    assert identical(fitted(built(2, 4, 16), MLUCallback(plan=str(tmp_path / "plan.yaml"))), ours)
    trainer = quiet(of_file, max_epochs=2)
    fresh = built(2, 4, 16)
    trainer.fit(fresh, DataLoader(TOKENS, batch_size=4))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match="another plan"):
        again = quiet(MLUCallback(built(), tuned={"embedding": {"lr": 3.0}}), max_epochs=3)
        again.fit(built(2, 4, 16), DataLoader(TOKENS, batch_size=4), ckpt_path=str(tmp_path / "run.ckpt"))
    assert "tuned" not in Plan.from_model(built(), TOKENS[:4], base=built()).to_yaml()
    with pytest.raises(ValueError, match=r"given together with .*tuned"):
        MLUCallback(plan=plan, tuned=tuned)


class Zeros(CausalTransformer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        nn.init.zeros_(self.readout.weight)


REFUSED: list[tuple[Any, str]] = [
    ({"branch_hidden": {"lr": 2.0}}, r"factor of lr for 'branch_hidden', which matches nothing.*roles are embedding"),
    ({"branch_in@convolution": {"lr": 2.0}}, "matches nothing in this module"),
    ({"blocks.*": {"lr": 2.0}}, "globs of parameter names, such as tokens.weight"),
    (
        {"embedding": {"multiplier": 2.0}},
        r"multiplier for 'embedding', and tokens.weight have none.*branch_out and readout",
    ),
    ({"readout": {"std": 2.0}}, r"std for 'readout', but readout.weight start at zero"),
    ({"frozen": {"lr": 2.0}}, "matches nothing"),
    ({"embedding": {"rate": 2.0}}, "tuned, embedding: there is no factor of 'rate'. There are: std, lr, weight_decay"),
    ({"embedding": 2.0}, "tuned, embedding: 2.0 should be a mapping of factors, such as"),
    *(
        ({"embedding": {"lr": v}}, "lr: .* should be a number from 1e-20 to 1e")
        for v in (0, -1, float("nan"), True, None, "x")
    ),
]


@pytest.mark.parametrize(("tuned", "message"), REFUSED)
def test_what_is_no_factor_is_refused(tuned: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.from_model(built(make=Zeros), TOKENS[:4], base=built(make=Zeros), tuned=tuned)


def test_files_that_are_none(tmp_path: Any) -> None:
    path = tmp_path / "tuned.yaml"
    path.write_text("- embedding\n")
    with pytest.raises(ValueError, match=r"tuned\.yaml is \['embedding'\], and should be a mapping"):
        MLUCallback(built(), tuned=str(path))
    with pytest.raises(OSError, match="nowhere"):
        MLUCallback(built(), tuned=str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize("as_file", [True, False])
def test_from_the_command_line(tmp_path: Any, as_file: bool) -> None:
    (tmp_path / "tuned.yaml").write_text("embedding: {lr: 2, std: 4}\n")
    tuned = str(tmp_path / "tuned.yaml") if as_file else "{embedding: {lr: 2, std: 4}}"
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=MLUCallback)
    given = parser.parse_args(["--callback=MLUCallback", f"--callback.tuned={tuned}"])
    callback = parser.instantiate_classes(given)["callback"]
    assert callback._arguments.tuned == {"embedding": {"lr": 2.0, "std": 4.0}}
