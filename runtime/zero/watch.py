"""How a module's use of its parameters becomes a demand for their units, whatever the module is.

[Note: uses]
Three ways lead to a parameter. A module's forward: hooks around it demand the units of the parameters that it owns
(of the whole block, if it is one) and keep them until it ends. An attribute (`model.position.weight[:n]` in the
forward of another module): the dictionary behind the module's attributes tells; the unit stays until the module whose
forward runs ends; outside of any, until the backward is over or, without gradients, until its slot is wanted. What a
module gives of its parameters (`forward` returns one) is used by the module around it. The backward: see
[Note: saved tensors].

[Note: recomputation]
A forward within the backward is a recomputation: what it uses stays until it has been differentiated. A trained unit
has been when all its gradients are there (`done_with`), a frozen one when the gradient of its block's input is: a hook
on that input tells.
"""

from __future__ import annotations

from collections.abc import ItemsView, Mapping, Sequence, ValuesView
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from dstrain.runtime.hooks import Hook
from dstrain.runtime.zero.gatherer import Gatherer
from dstrain.runtime.zero.unit import UnitState, ZeroUnit


class Watch:
    """The hooks on all modules of one model. in_backward: set by the engine around each backward."""

    def __init__(self, model: nn.Module, gatherer: Gatherer, units_of_module: Mapping[str, Sequence[ZeroUnit]]) -> None:
        """units_of_module: of blocks, by their names."""
        self.in_backward = False
        self._gatherer = gatherer
        self._scopes: list[list[ZeroUnit]] = []
        self._outermost = ExitStack()
        unit_of = {parameter: unit for unit in gatherer.units for parameter in unit.parameters}
        for name, module in model.named_modules(remove_duplicate=True):
            own = [unit_of[p] for p in module.parameters(recurse=False) if p in unit_of]
            units = list(dict.fromkeys([*units_of_module.get(name, ()), *own]))
            near = [unit_of[p] for child in module.children() for p in child.parameters(recurse=False) if p in unit_of]
            if units or module is model or any(not unit.resident for unit in near):  # near: read as attributes
                self._hook(module, units)
            if any(not unit.resident for unit in (gatherer.units if module is model else own)):
                module.register_state_dict_pre_hook(_refuse_state_dict)
                module.register_load_state_dict_pre_hook(_refuse_load_state_dict)
            if own:
                module._parameters = _Watched(module._parameters, unit_of, self)

    def use(self, unit: ZeroUnit) -> None:
        """Somebody reads a parameter of the unit."""
        is_inside = bool(self._scopes)
        self._gatherer.demand(unit, foresee=is_inside)
        if unit.resident or any(unit in scope for scope in self._scopes):
            return
        if is_inside or torch.is_grad_enabled():
            self._gatherer.pin(unit)
        if is_inside:
            self._scopes[-1].append(unit)

    def read(self, unit: ZeroUnit) -> None:
        """Somebody reads all of a module's parameters, which is no use: to have the new values of a resident unit."""
        if unit.resident and unit.state is not UnitState.WHOLE:
            self._gatherer.demand(unit, foresee=False)

    def _hook(self, module: nn.Module, units: list[ZeroUnit]) -> None:
        moving = [unit for unit in units if not unit.resident]
        frozen = [unit for unit in moving if not unit.is_trained]

        def before(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            if not self._scopes and not self.in_backward:
                self._gatherer.begin_forward(torch.is_grad_enabled())
                self._outermost.enter_context(self._gatherer.saving())
            self._scopes.append(list(moving))
            for unit in moving:
                self._gatherer.pin(unit)
            for unit in units:
                self._gatherer.demand(unit)
            if frozen and not self.in_backward:
                _when_differentiated([*arguments, *keywords.values()], frozen)

        def after(_: nn.Module, __: Any, output: Any) -> None:
            scope = self._scopes.pop()
            given = self._gatherer.units_in(output) if scope and not self.in_backward else set()
            for unit in scope:
                if unit in given and self._scopes:
                    self._scopes[-1].append(unit)
                elif not self.in_backward and not (unit in given and torch.is_grad_enabled()):
                    self._gatherer.unpin(unit)
            if not self._scopes:
                self._outermost.close()

        module.register_forward_pre_hook(Hook(before), with_kwargs=True)
        module.register_forward_hook(Hook(after), always_call=True)


def _refuse_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """keep_vars: whoever wants the parameters themselves gets them, as from `model.parameters()`."""
    if not keep_vars:
        said = "expected engine.save_model, engine.save_checkpoint or engine.whole, found state_dict() of a model at "
        raise TypeError(f"{said}zero.stage 3: no rank has all of it")


def _refuse_load_state_dict(module: nn.Module, *_: Any) -> None:
    said = "expected the weights to be loaded before initialize, or engine.whole(parameters, changed_on=rank) to write"
    raise TypeError(f"{said} them, found load_state_dict() of a model at zero.stage 3: no rank has all of it")


def _when_differentiated(inputs: Sequence[Any], units: Sequence[ZeroUnit]) -> None:
    """[Note: recomputation] A leaf's gradient comes early, that of any other tensor behind all that was made of it."""

    def unpin(_: Tensor) -> None:
        for unit in units:
            unit.pins = 0

    for tensor in inputs:
        if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
            tensor.register_hook(unpin)  # type: ignore[no-untyped-call] # torch's


class _Watched(dict[str, nn.Parameter | None]):
    """A module's parameters, which tell of being read. [Note: uses]"""

    def __init__(
        self, held: Mapping[str, nn.Parameter | None], unit_of: Mapping[nn.Parameter, ZeroUnit], watch: Watch
    ) -> None:
        super().__init__(held)
        self._unit_of, self._watch = unit_of, watch

    def __getitem__(self, name: str) -> nn.Parameter | None:
        parameter = super().__getitem__(name)
        unit = self._unit_of.get(parameter) if parameter is not None else None
        if unit is not None and not (unit.resident and unit.state is UnitState.WHOLE):
            self._watch.use(unit)
        return parameter

    def items(self) -> ItemsView[str, nn.Parameter | None]:  # type: ignore[override] # dict_items is its like
        self._read()
        return super().items()

    def values(self) -> ValuesView[nn.Parameter | None]:  # type: ignore[override]
        self._read()
        return super().values()

    def _read(self) -> None:
        for parameter in super().values():
            if parameter is not None and parameter in self._unit_of:
                self._watch.read(self._unit_of[parameter])

    def __reduce__(self) -> tuple[Any, ...]:
        """For a copy of the model, which nobody watches."""
        if any(p in self._unit_of and not self._unit_of[p].resident for p in super().values() if p is not None):
            said = "a model at zero.stage 3 cannot be copied: no rank has all of it; engine.save_model writes it"
            raise TypeError(said)
        return dict, (), None, None, iter(list(self.items()))
