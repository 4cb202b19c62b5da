"""The path through a bit-shift trellis whose values are nearest to given ones.

Viterbi's algorithm (Forney 1973), in C where that is compiled here, else in torch, where it takes
many times as long: step by step, with all cycles and states at once. A cycle closes where the best
open path through its seam does (the tail-biting of QTIP, section 3.2, with a short stretch in the
place of a whole first pass).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.native.build import library, missing

_FAR = 1e30
_MEETING = 64  # as in native/trellis.c


@dataclass(frozen=True, eq=False)
class Trellis:
    """States are windows of `window` bits; each step shifts `bits` new ones in from below.

    Attributes:
        table: the value of each state, (2^window,) float32.
        bits: of a step.
        run: steps of a cycle; the last one of a path takes what is left over.
    """

    table: Tensor
    bits: int
    run: int

    @property
    def n_shared(self) -> int:
        """Sets of states that share all bits that a step keeps."""
        return len(self.table) >> self.bits

    def bounds(self, n_steps: int) -> list[tuple[int, int]]:
        """Where cycles start and stop in a path of so many steps."""
        starts = [i * self.run for i in range(max(1, n_steps // self.run))]
        return list(zip(starts, [*starts[1:], n_steps], strict=True))

    def states(self, targets: Tensor, weights: Tensor) -> Tensor:
        """States (n,) int16 that take least ``sum_i weights_i (targets_i - value_i)^2``.

        Args:
            targets: (n,) float32.
            weights: (n,) float32, none below zero.
        """
        if missing():
            return self.by_torch(targets, weights)
        # also of a GPU: step by step, thousands of small kernels take longer than the way there
        return self.by_c(targets.cpu(), weights.cpu(), library()).to(targets.device)

    def by_c(self, targets: Tensor, weights: Tensor, functions: ctypes.CDLL) -> Tensor:
        """As `states`, by the compiled `functions`, on the CPU."""
        x, w, n = targets.contiguous(), weights.contiguous(), len(targets)
        found = torch.empty(n, dtype=torch.int16)
        window = len(self.table).bit_length() - 1
        sizes = (n, self.run, self.table.data_ptr(), window, self.bits)
        threads = torch.get_num_threads()
        if functions.trellis_states(x.data_ptr(), w.data_ptr(), *sizes, found.data_ptr(), threads):
            raise MemoryError(f"There is no memory for a path of {n} steps.")
        return found

    def by_torch(self, targets: Tensor, weights: Tensor) -> Tensor:
        """As `states`, without a compiler."""
        *alike, last = self.bounds(len(targets))
        found = []
        if alike:
            stop, n = last[0], len(alike)
            found.append(self._cycles(targets[:stop].view(n, -1), weights[:stop].view(n, -1)))
        found.append(self._cycles(targets[None, last[0] :], weights[None, last[0] :]))
        return torch.cat([states.view(-1) for states in found]).to(torch.int16)

    def _cycles(self, targets: Tensor, weights: Tensor) -> Tensor:
        side = min(_MEETING, targets.shape[1] // 2)
        near = [torch.cat([x[:, -side:], x[:, :side]], 1) for x in (targets, weights)]
        seam = self._path(near[0], near[1], None)[:, side - 1] % self.n_shared
        return self._path(targets, weights, seam)

    def _path(self, targets: Tensor, weights: Tensor, seam: Tensor | None) -> Tensor:
        (n, n_steps), fan = targets.shape, 1 << self.bits
        table = self.table.to(targets.device).view(-1, fan)
        least = targets.new_zeros(n, self.n_shared)
        if seam is not None:
            least.fill_(_FAR).scatter_(1, seam[:, None], 0.0)
        came = [torch.zeros(n, self.n_shared, dtype=torch.uint8, device=targets.device)]
        for i in range(n_steps):
            off = targets[:, i, None, None] - table
            costs = (off * off * weights[:, i, None, None]).add_(least[..., None])
            least, source = costs.view(n, fan, -1).min(1)
            came.append(source.to(torch.uint8))
        final = costs.view(n, -1)
        if seam is None:
            state = final.argmin(1)
        else:
            ends = torch.arange(fan, device=seam.device) * self.n_shared + seam[:, None]
            state = ends.gather(1, final.gather(1, ends).argmin(1, keepdim=True))[:, 0]
        return self._traced(state, came)

    def _traced(self, state: Tensor, came: list[Tensor]) -> Tensor:
        """States (n, steps) of the paths that end in `state` (n,)."""
        states = []
        for source in reversed(came[:-1]):
            states.append(state)
            shared = state >> self.bits
            state = source.gather(1, shared[:, None])[:, 0].long() * self.n_shared + shared
        return torch.stack(states[::-1], 1)
