"""A bank whose schemes may be misbehaviours."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autocompress.bank import Bank
from autocompress.core import Scheme
from autocompress.methods import InputMap

SCRIBBLE = 12345.0
"""The weights that tell a task to write to the base model."""


class ScriptedBank(Bank):
    """A bank for which some schemes are misbehaviours instead of methods.

    ``fail`` raises, ``exhaust`` runs out of memory, ``nan`` gives weights that are not finite,
    ``scribble`` makes the task write to the base model; ``crash`` ends the process, ``crash_once``
    only the first time; ``hang`` never comes back. Filling does what ends the process alone.
    """

    def prepare(self, allocation: Mapping[str, Scheme]) -> None:
        """Misbehaviours are not built ahead."""

    def fill(self, wanted: Mapping[str, Sequence[Scheme]], **options: Any) -> None:
        """Builds schemes that are none of the misbehaviours."""
        for script in {s.stages[0].method for schemes in wanted.values() for s in schemes}:
            if script == "crash_once":
                self._crash_once()
            _misbehave(script)
        methods = {n: [s for s in wanted[n] if s.stages[0].method == "rtn"] for n in wanted}
        super().fill(methods, **options)

    def dense(self, name: str, scheme: Scheme, dtype: torch.dtype) -> Tensor:
        """The matrix, or the misbehaviour."""
        script = scheme.stages[0].method
        layer = self.layout.layer(name)
        shape = (layer.out_features, layer.in_features)
        if script == "nan":
            return torch.full(shape, torch.nan, dtype=dtype)
        if script == "scribble":
            return torch.full(shape, SCRIBBLE, dtype=dtype)
        if script == "crash_once":
            self._crash_once()
            return torch.full(shape, torch.nan, dtype=dtype)
        _misbehave(script)
        return super().dense(name, scheme, dtype)

    def input_maps(self, allocation: Mapping[str, Scheme]) -> dict[str, InputMap]:  # noqa: ARG002
        """See `Bank.input_maps`; no scheme rounds inputs."""
        return {}

    def notes(self, name: str, scheme: Scheme) -> tuple[str, ...]:
        """None for misbehaviours."""
        is_method = scheme.stages[0].method == "rtn"
        return super().notes(name, scheme) if is_method else ()

    def _crash_once(self) -> None:
        marker = self.root / "crashed"
        if not marker.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            marker.touch()
            os._exit(1)


def _misbehave(script: str) -> None:
    if script == "fail":
        raise ValueError("scripted failure")
    if script == "exhaust":
        raise MemoryError("scripted exhaustion")
    if script == "crash":
        os._exit(1)
    if script == "hang":
        time.sleep(3600)
