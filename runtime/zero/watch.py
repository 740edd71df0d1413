"""How a module's use of its parameters becomes a demand for their units, whatever the module is.

[Note: uses]
Three ways lead to a parameter. A module's forward: hooks around it demand the units of the parameters that it owns
(of the whole block, if it is one) and keep them until it ends. An attribute (`model.position.weight[:n]` in the
forward of another module): the dictionary behind the module's attributes tells; the unit stays until the module whose
forward runs ends; outside of any, until the backward is over or, without gradients, until its slot is wanted. The
backward: see [Note: saved tensors]. A forward within the backward is a recomputation: what it uses stays until its
gradients are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from dstrain.runtime.zero.gatherer import Gatherer
from dstrain.runtime.zero.unit import ZeroUnit


class Watch:
    """The hooks on all modules of one model. in_backward: set by the engine around each backward."""

    def __init__(self, model: nn.Module, gatherer: Gatherer, units_of_module: Mapping[str, Sequence[ZeroUnit]]) -> None:
        """units_of_module: of blocks, by their names."""
        self.in_backward = False
        self._gatherer = gatherer
        self._scopes: list[list[ZeroUnit]] = []
        unit_of = {parameter: unit for unit in gatherer.units for parameter in unit.parameters}
        for name, module in model.named_modules(remove_duplicate=True):
            own = [unit_of[p] for p in module.parameters(recurse=False) if p in unit_of]
            units = list(dict.fromkeys([*units_of_module.get(name, ()), *own]))
            if units:
                self._hook(module, units)
            if own and any(not unit.resident for unit in own):
                module._parameters = _Watched(module._parameters, unit_of, self)

    def use(self, unit: ZeroUnit) -> None:
        """Somebody reads a parameter of the unit."""
        self._gatherer.demand(unit)
        if unit.resident or any(unit in scope for scope in self._scopes):
            return
        if self._scopes:
            self._scopes[-1].append(unit)
            self._gatherer.pin(unit)
        elif torch.is_grad_enabled():
            self._gatherer.pin(unit)

    def _hook(self, module: nn.Module, units: list[ZeroUnit]) -> None:
        moving = [unit for unit in units if not unit.resident]

        def before(*_: Any) -> None:
            self._scopes.append(list(moving))
            for unit in moving:
                self._gatherer.pin(unit)
            for unit in units:
                self._gatherer.demand(unit)

        def after(*_: Any) -> None:
            for unit in self._scopes.pop():
                if not self.in_backward:
                    self._gatherer.unpin(unit)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after, always_call=True)


class _Watched(dict[str, nn.Parameter | None]):
    """A module's parameters, which tell of being read by name. [Note: uses]"""

    def __init__(
        self, held: Mapping[str, nn.Parameter | None], unit_of: Mapping[nn.Parameter, ZeroUnit], watch: Watch
    ) -> None:
        super().__init__(held)
        self._unit_of, self._watch = unit_of, watch

    def __getitem__(self, name: str) -> nn.Parameter | None:
        parameter = super().__getitem__(name)
        unit = self._unit_of.get(parameter) if parameter is not None else None
        if unit is not None:
            self._watch.use(unit)
        return parameter

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError("a model at zero.stage 3 cannot be copied: no rank has all of it; engine.save_model writes it")
