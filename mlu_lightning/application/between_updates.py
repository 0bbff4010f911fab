"""Changes of weights and gradients between the first updates that a plan knows nothing of: limits, decays, noise.

These are warned of, because they may be meant: where multipliers are folded, weights are smaller by them and gradients
larger, and everywhere roles have scales and decays of their own.
"""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from mlu_lightning.application.applied import folded_parameters
from mlu_lightning.application.clipping import EDITS
from mlu_lightning.utilities.names import listed, original_module
from mlu_lightning.utilities.samples import Sample, samples


class BetweenUpdates:
    """Watches weights and gradients between the first updates; the module counts meanwhile how often it is unfolded."""

    def __init__(self, module: nn.Module, start: Mapping[str, Sample]) -> None:
        self._module = module = original_module(module)
        self._folded = folded_parameters(module)
        self._weights = dict(start)
        self._updated: set[str] = set()
        self._gradients: dict[str, Sample] = {}
        self._versions: dict[str, tuple[int, int]] = {}
        self._edits = vars(module)[EDITS] = 0
        self._said: set[str] = set()

    def end(self) -> None:
        """Count no more."""
        vars(self._module).pop(EDITS, None)

    def after_backward(self, trained: Mapping[str, Tensor]) -> None:
        """Look at weights in the middle of a step, and note gradients."""
        if moved := self._moved(samples({name: p for name, p in trained.items() if name in self._folded})):
            self._say(
                f"Weights are moved in the first step before their update: {listed(moved)}. They have multipliers in them, "
                "so it is not as far as in the same run with hooks, as where SAM climbs before it descends. Give "
                'MLUCallback residual="hook" for that.'
            )
        gradients = {name: grad for name, p in trained.items() if (grad := p.grad) is not None}
        self._gradients, self._versions = samples(gradients), {n: (id(g), g._version) for n, g in gradients.items()}
        self._edits = vars(self._module).get(EDITS, 0)

    def before_update(self, own: Mapping[str, Tensor]) -> None:
        """Look whether somebody has changed gradients."""
        before = {name: self._gradients.pop(name) for name in {*own} & {*self._gradients}}
        gradients = {name: grad for name in before if (grad := own[name].grad) is not None}
        now = samples(gradients) if self._edits == vars(self._module).get(EDITS, 0) else {}
        if decayed := [n for n in sorted({*now} & {*self._weights}) if before[n].has_part_of(self._weights[n], now[n])]:
            self._say(
                f"Gradients were changed by a part of the weights themselves, as an L2 decay does: {listed(decayed)}. It is "
                "the same for all roles, whose plan has one for each: leave it to the optimizer's weight_decay."
            )
        left = sorted(({*now} & self._folded) - {*decayed})
        if changed := [name for name in left if self._is_changed(name, before[name], now[name], gradients)]:
            self._say(
                "Gradients were changed between backward and the first updates, or multiplied by 1, as by clipping that "
                f"does not bind yet: {listed(changed)}. Of weights that have multipliers in them they are larger by "
                "1/multiplier, so what clips, limits or adds to them does something else than in the same run with hooks. "
                "Let Lightning clip (gradient_clip_val, configure_gradient_clipping, self.clip_gradients), do it in "
                "unfolded_gradients(module, plan), and in "
                'unfolded_weights(module, plan) if it reads weights, too; or give MLUCallback residual="hook".'
            )

    def _is_changed(self, name: str, before: Sample, now: Sample, gradients: Mapping[str, Tensor]) -> bool:
        """Whether a gradient was changed by anything but a power of two, or written to and left as it was."""
        if not before.is_of(now):
            return not before.is_doubled(now)
        number, version = self._versions[name]
        gradient = gradients[name]
        return id(gradient) == number and gradient._version != version and bool(now.values.any())

    def after_update(self, found: Mapping[str, Sample]) -> None:
        """Note weights that were updated."""
        self._weights.update(found)
        self._updated |= found.keys()

    def before_batch(self, trained: Mapping[str, Tensor]) -> None:
        """Look whether weights were changed after their first update."""
        now = samples({name: parameter for name, parameter in trained.items() if name in self._updated})
        moved = self._moved(now)
        self._weights.update(now)
        if moved and self._edits == vars(self._module).get(EDITS, 0):
            self._say(
                f"Weights were changed after their first update, by other code than an optimizer's: {listed(moved)}. A "
                "decay of your own is the same for all roles, whose plan has one for each: leave it to the optimizer's "
                "weight_decay. A limit on weights should be as large as their plan makes them, next to the base; where "
                "multipliers are in them, apply it in unfolded_weights(module, plan)."
            )

    def _moved(self, now: Mapping[str, Sample]) -> list[str]:
        return sorted(n for n, found in now.items() if n in self._weights and not self._weights[n].is_near(found))

    def _say(self, text: str) -> None:
        if text.partition(":")[0] not in self._said:
            self._said.add(text.partition(":")[0])
            rank_zero_warn(text)
