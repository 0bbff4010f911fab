"""The callback that makes a Lightning training an MLU training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from mlu_lightning.application import InitMode
from mlu_lightning.application.applied import Applied, residual_state, set_applied
from mlu_lightning.application.checkpoint import STATE_KEY, WHERE, warn_of_hooks, write_plan
from mlu_lightning.application.initialization import initial_steps
from mlu_lightning.application.multipliers import check_attached, put_in
from mlu_lightning.application.own_optimizers import Optimizers
from mlu_lightning.application.transaction import end_loading, settle
from mlu_lightning.callbacks._either_callback import EitherCallback
from mlu_lightning.callbacks.announcement import announce
from mlu_lightning.callbacks.base_module import built_base
from mlu_lightning.callbacks.example import find_example
from mlu_lightning.callbacks.gradient_clipping import wrap_clipping
from mlu_lightning.callbacks.loggers import log_plan
from mlu_lightning.callbacks.model_copies import check_copies, copy_again, warn_of_pruning
from mlu_lightning.callbacks.passing_changes import PassingChanges, wrap_method
from mlu_lightning.callbacks.saved_plans import wrap_loading, wrap_saving
from mlu_lightning.callbacks.strategies import check_strategy, check_whole, wrap_layer_sync
from mlu_lightning.callbacks.verified_function import verify_function
from mlu_lightning.callbacks.verified_steps import Verification, refuse_unscaled
from mlu_lightning.planning import Plan
from mlu_lightning.planning.arguments import ABSOLUTE, ParameterizationName, PlanArguments
from mlu_lightning.planning.tuned import read_tuned
from mlu_lightning.utilities.lightning_namespaces import is_hook_overridden
from mlu_lightning.utilities.lightning_private import configured_optimizers, starts_processes
from mlu_lightning.utilities.names import original_module

Residual = Literal["hook", "fold"]
FamilyName = Literal["sgd", "adam", "adamw", "muon"]


class MLUCallback(EitherCallback):
    """Train a LightningModule in the MLU parameterization, with the hyperparameters of a base shape.

    Add one to a Trainer, and ``fit`` plans the module (theory.md, section 3), sets the scale of its initial weights,
    multiplies its branches and readouts, and scales its optimizers. The module, its ``configure_optimizers``, its
    schedulers and loggers stay as they are: learning rates in them are those of the base. At the base's own shape the
    run is bit for bit the run without the callback.

    Checkpoints are those of a plain module of the trained function. Where they cannot be, as the fit warns, or with
    ``residual="hook"``, a key more in their ``state_dict`` lets a plain module refuse them; a Trainer with this callback
    and :func:`mlu_lightning.restore_multipliers` load them.

    The module is planned and initialized before ``fit`` does anything else, or, if it overrides ``setup`` or
    ``configure_model``, right after the later of them, and goes on from its weights in the next ``fit``. ``validate``,
    ``test`` and ``predict`` alone change nothing, but a checkpoint brings its multipliers along, whatever ``residual`` is
    here. Callbacks of others than Lightning that copy the module in their ``setup`` should come after this one.

    Args:
        base: shape at which the hyperparameters are known to be good: a freshly built module of that shape, a function
            that builds one (in YAML, a ``class_path`` with its ``init_args``), or a plan whose base has it, or its path.
            ``"absolute"`` for the paper's absolute form, whose learning rates are those of the infinite model; None is
            the same, with a warning.
        plan: finished plan, or the path of one, instead of base, overrides, alpha, parameterization, ratios and tuned.
        init: ``"rescale"`` sets the scale of the initial weights, ``"normal"`` draws matrices anew, ``"coupled"`` draws
            embeddings that are the first coordinates of a bigger model's, and None leaves a checkpoint's weights alone.
        residual: how branches and readouts are multiplied: ``"fold"`` in the weights, which then are those of a plain model
            of the same function, unless the fit warns that hooks are left; ``"hook"`` in the forward pass. A resumed run
            goes on as it began. Where weights hold their multipliers already, call ``fold(module, plan,
            multiplied=True)`` before, and give ``init=None``.
        overrides: role by glob pattern of parameter names, for parameters that discovery cannot place.
        alpha: richness of the branches: 1 for MLU, large values tend to a linearized model.
        example: batch as ``training_step`` takes it, for planning; by default the first samples of the training data.
        seed: seed of what ``init`` draws, and of a base that is built here.
        family: column of the table (``"sgd"``, ``"adam"``, ``"adamw"`` or ``"muon"``) for optimizers that ``torch.optim``
            does not define; a list with one for each parameter group where they differ.
        parameterization: ``"mlu"``, or, to compare with it, ``"completep"``, ``"mup"`` or ``"sp"``, which need a base.
        batch_ratio: tokens in a batch over those in one of the base's; changes AdamW's numbers, betas included.
        token_ratio: tokens seen in all of the training over those that the base saw.
        tuned: factors that were found at the base, by role, role in one kind of branch, or pattern of parameter names, such
            as ``{"embedding": {"lr": 1.9, "std": 2.7}, "branch_out@mlp": {"lr": 0.4}}`` (also of ``"weight_decay"``, and of
            ``"multiplier"`` for branch_out and readout), or the path of a YAML file of them. They act at the base, too.
        verify: compare weights, function and first step with the plan, and stop a run that is not the plan's; False turns
            it off.

    Raises:
        OSError: if there is no file of tuned factors.
        ValueError: if arguments contradict each other, or tuned has what is no factor.

    Example:
        >>> import torch
        >>> from mlu_lightning.models import ResNet
        >>> base, deeper = (ResNet(depth, hidden=16, embedding=8, inputs=3, outputs=2) for depth in (2, 4))
        >>> data = torch.utils.data.DataLoader([(torch.ones(3), torch.ones(2))] * 8, batch_size=4)
        >>> trainer = Trainer(max_epochs=1, accelerator="cpu", barebones=True, callbacks=[MLUCallback(base)])
        >>> trainer.fit(deeper, data)
        >>> trainer.callbacks[0].plan.multipliers[0].value
        0.5
    """

    def __init__(
        self,
        base: str | Callable[[], nn.Module] | nn.Module | Path | None = None,
        plan: Plan | str | Path | None = None,
        init: InitMode | None = "rescale",
        residual: Residual = "fold",
        overrides: dict[str, str] | None = None,
        alpha: float = 1.0,
        example: Any = None,
        seed: int = 0,
        family: FamilyName | list[FamilyName] | None = None,
        parameterization: ParameterizationName = "mlu",
        batch_ratio: float = 1.0,
        token_ratio: float = 1.0,
        tuned: dict[str, dict[str, float]] | str | Path | None = None,
        verify: bool = True,
    ) -> None:
        super().__init__()
        if init not in (*get_args(InitMode), None):
            raise ValueError(f"init={init!r} is none of: {', '.join(get_args(InitMode))}, None.")
        if residual not in get_args(Residual):
            raise ValueError(f"residual={residual!r} is none of: {', '.join(get_args(Residual))}.")
        factors = None if tuned is None else read_tuned(tuned)
        self._arguments = PlanArguments(base, overrides, alpha, parameterization, batch_ratio, token_ratio, factors)
        if plan is not None and self._arguments != PlanArguments():
            *names, last = vars(self._arguments)
            raise ValueError(
                "A plan holds its base, roles, alpha, parameterization, ratios and tuned factors, so it cannot be "
                f"given together with {', '.join(names)} or {last}. Give these alone, to plan anew, or edit the plan."
            )
        self._given = plan
        self._init = init
        self._residual: Residual = residual
        self._example = example
        self._seed = seed
        self._family = family
        self.verify = verify
        self._seen: Any = None  # the example that was planned with, until the training starts
        self._plan: Plan | None = None
        self._planned: Plan | None = None
        self._initialized = False
        self._optimizers: Optimizers | None = None  # of the fit that goes on
        self._verification: Verification | None = None
        self._changes: PassingChanges | None = None

    @property
    def plan(self) -> Plan | None:
        """Plan of the module that was fitted, or evaluated with multipliers, last; None before."""
        return self._plan

    @property
    def arguments(self) -> PlanArguments:
        """What the module is planned with, if no plan was given."""
        return self._arguments

    def with_plan(self, plan: Plan) -> MLUCallback:
        """Return a callback that does the same with a finished plan."""
        return MLUCallback(
            plan=plan,
            init=self._init,
            residual=self._residual,
            seed=self._seed,
            family=self._family,
            verify=self.verify,
        )

    @property
    def initialized(self) -> bool:
        """Whether the last fit initialized the module, which a fit of a module that was trained before does not."""
        return self._initialized

    @property
    def state_key(self) -> str:
        """Where checkpoints have the plan; subclasses read each other's."""
        return STATE_KEY

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Plan and initialize the module, now or when it will have been built."""
        callbacks: list[Callback] = vars(trainer)["callbacks"]
        if sum(isinstance(callback, MLUCallback) for callback in callbacks) > 1:
            raise ValueError("The Trainer has several MLUCallbacks, each of which would scale the module. Keep one.")
        # of a run after which Lightning called no hook, as after an error in another's on_exception
        self._undo_changes()
        if stage == TrainerFn.FITTING:
            PassingChanges.undo_all(pl_module)
        settle(pl_module)
        self._changes = changes = PassingChanges(pl_module)
        wrap_loading(pl_module, partial(self._keep, pl_module), changes)
        if stage != TrainerFn.FITTING:
            self._keep(pl_module)
            return
        self._seen = None
        check_copies(callbacks)
        check_strategy(trainer.strategy)
        builders = [name for name in ("setup", "configure_model") if is_hook_overridden(name, pl_module)]
        if not builders:
            self._prepare(trainer, pl_module, callbacks[: callbacks.index(self)], changes)
            return
        prepared = False

        def build(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal prepared
            result = method(*args, **kwargs)
            if not prepared:  # WeightAveraging calls configure_model, too
                prepared = True
                with torch.device("cpu"):  # instead of the device that new parameters were made on
                    self._prepare(trainer, pl_module, callbacks, changes)
            return result

        wrap_method(pl_module, builders[-1], build, changes.note)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the fit does, and log the plan and save it, where a logger has a place for it."""
        self._look("in on_fit_start of a callback that comes before MLUCallback")
        if self._plan is not None:
            parts = [] if self._optimizers is None else self._optimizers.parts
            families = {name: family for part in parts for name, family in part.families.items()}
            self._plan = replace(self._plan, optimizers=tuple(dict.fromkeys(families.values())))
            applied = residual_state(pl_module)
            if applied is not None:
                set_applied(original_module(pl_module), applied := replace(applied, plan=self._plan))
                announce(trainer, applied)
            log_plan(trainer.loggers, self._plan, self._residual, families)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse weights that are not the plan's, and, before the first step, what computes something else."""
        example, self._seen = self._seen, None

        def compare() -> None:
            if self._initialized and example is not None:
                assert self._plan is not None
                verify_function(trainer, pl_module, self._plan, self._arguments.base, example, self._seed)

        if self._verification is not None:
            assert self._changes is not None
            self._verification.start(trainer, self._changes, compare)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note that the weights are others now."""
        end_loading(pl_module)
        if self._verification is not None:
            self._verification.loaded()
        self._seen = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Refuse what was done to weights after the first step."""
        if self._verification is not None and (steps := self._verification.steps) is not None:
            steps.look_before_batch()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """Refuse a loss that is computed around multipliers."""
        if self._verification is not None and (steps := self._verification.steps) is not None:
            steps.before_backward(loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the gradients, which others may change."""
        if self._verification is not None and (steps := self._verification.steps) is not None:
            steps.after_backward()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refuse updates at other numbers than the plan's."""
        if self._verification is not None:
            self._verification.batch_end(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Refuse an update that is nobody's: what has the module's parameters was scaled when its step began."""
        refuse_unscaled(optimizer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the plan that is in effect on the module, as YAML, and where its multipliers are."""
        write_plan(pl_module, checkpoint)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its methods back, and make its optimizers plain."""
        self._undo_changes()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the module its methods back, and make its optimizers plain."""
        self._undo_changes()

    def _undo_changes(self) -> None:
        if self._changes is not None:
            self._changes.undo()
            self._changes = None

    def _prepare(
        self, trainer: Trainer, module: LightningModule, earlier: list[Callback], changes: PassingChanges
    ) -> None:
        """Apply a plan to the module, which has been built, to copies of earlier callbacks, and later to its optimizers."""
        check_attached(module)
        if residual_state(module) is None:
            check_whole(trainer.strategy, module)
        # that of the first process for all: a base that each draws by itself has another std in each
        self._plan = self._planned = plan = trainer.strategy.broadcast(self._plan_of(trainer, module))
        for warning in plan.advice:
            rank_zero_warn(warning)
        if starts_processes(trainer.strategy) and Applied(plan, self._residual).acting:
            raise ValueError(
                "The Trainer trains in processes started from this one, and only weights come back, without the multipliers "
                'that stay in hooks: the module would be another function. Use strategy="ddp", or residual="fold" where '
                "all multipliers can be in the weights."
            )
        self._optimizers = optimizers = Optimizers(module, plan, self._family)
        deferred = any(parameter.is_meta for parameter in module.parameters())
        if not deferred:
            self._apply(module, plan, optimizers)
            copy_again(earlier, trainer, module)

        def configure(method: Callable[..., Any]) -> Any:
            if deferred:
                # a sharded strategy has given the parameters their values now, and restores checkpoints later
                self._apply(module, plan, optimizers)
            self._look("in setup of a callback that comes after MLUCallback")
            configured = method()
            self._look("in configure_optimizers")
            for optimizer in [] if configured is None else configured_optimizers(configured)[0]:
                optimizers.add(optimizer)
            return configured

        changes.note(optimizers.remove)
        wrap_method(module, "configure_optimizers", configure, changes.note)
        optimizers.add_at_step()
        wrap_layer_sync(trainer.strategy, module, plan, changes)
        if self._residual == "fold":
            warn_of_hooks(plan)
            warn_of_pruning(vars(trainer)["callbacks"])
            wrap_clipping(trainer, module, plan, changes)

    def _plan_of(self, trainer: Trainer, module: LightningModule) -> Plan:
        """Plan in effect on the module, the given one, or a new one."""
        applied = residual_state(module)
        if self._planned is not None and applied is not None and applied.is_of(self._planned):
            return self._planned
        if self._given is not None:
            return self._given if isinstance(self._given, Plan) else Plan.load(self._given)
        if any(hasattr(parameter, "placements") for parameter in module.parameters()):
            raise ValueError(
                "The module's parameters are sharded already (DTensor), and planning needs a forward pass of the whole "
                "module. Plan it before, as it is without configure_model's sharding: "
                "Plan.from_model(module, example, base=...).save(path), and give MLUCallback(plan=path)."
            )
        if self._arguments.base is None:
            rank_zero_warn(
                "MLUCallback was given neither base nor plan, so its factors are relative to a depth, hidden width and "
                "embedding of 1 (the paper's absolute form), at which a learning rate that suits an ordinary model is far "
                f'off: give it base=..., a module at the shape that the learning rate was tuned at, or base="{ABSOLUTE}" if '
                "that is what you want."
            )
        self._seen = example = find_example(trainer, module) if self._example is None else self._example
        with built_base(self._arguments.base, module, trainer, self._seed) as base:
            return Plan.from_model(module, example, **{**vars(self._arguments), "base": base})

    def _apply(self, module: LightningModule, plan: Plan, optimizers: Optimizers) -> None:
        applied = residual_state(module)
        self._initialized = applied is None and self._init is not None
        if applied is None:
            first = [] if self._init is None else initial_steps(module, plan, self._init, self._seed)
            put_in(module, plan, self._residual, first, initialized=True)
        elif applied.mode != self._residual:
            advice = "" if applied.mode == "baked" else f"residual={applied.mode!r}, or "
            raise ValueError(
                f"The module has its multipliers {WHERE[applied.mode]} already, but MLUCallback has "
                f"residual={self._residual!r}. Give it {advice}a module that was built anew."
            )
        elif not applied.is_of(plan):
            raise ValueError(
                "The module has the multipliers of another plan than that of this MLUCallback. Give it the base, "
                "overrides and alpha, or the plan, that the module was trained with, or a module that was built anew."
            )
        elif self._init is not None and not applied.initialized:
            raise ValueError(
                "The module has its multipliers already, and it is not known whether it was initialized: they are not from "
                "an MLUCallback, or weights were changed before a fit began. Call initialize(module, plan) before "
                "attach_multipliers or fold and give init=None to MLUCallback, or give it a module that was built anew."
            )
        wrap_saving(module)
        given = module, plan, optimizers, self._initialized, self._arguments.overrides or ()
        self._verification = Verification(*given) if self.verify else None

    def _look(self, who: str) -> None:
        if self._verification is not None:
            self._verification.look(who)

    def _keep(self, module: LightningModule) -> None:
        """Take the plan that is in effect on a module, if there is one, and let its checkpoints have it."""
        applied = residual_state(module)
        if applied is not None:
            self._plan = applied.plan
            wrap_saving(module)
