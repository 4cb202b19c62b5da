"""Prefix sharing: a forward starts where it first differs from one that was run before.

The output of each block is kept, under a key of all that computed it: the batch, and the schemes of
every layer that has run by then. A later forward whose key at block k is known skips the blocks up
to k; what runs after them gets the very tensors that it would have got, so results are equal bit by
bit. Nothing here knows a model by name: which layers run before the end of which block is observed
once, and one forward is checked against itself before anything is skipped.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from autocompress.core import Allocation
from autocompress.models.layout import ModelLayout
from autocompress.models.prefix_outputs import Entry, Output, equal_outputs
from autocompress.models.prefix_plan import PrefixPlan, Trace, UnsupportedError, make_plan

_log = logging.getLogger(__name__)

DEFAULT_PREFIX_BYTES = 256 << 20
_ALLOCATIONS = 2
"""Block outputs are thinned out until those of so many allocations fit: with less, each trial
would drop what the next one needs."""


@dataclass(frozen=True, slots=True)
class PrefixCounts:
    """Work that was asked for and done.

    Attributes:
        blocks: block forwards that plain forwards would have computed.
        computed: block forwards that were computed.
    """

    blocks: int = 0
    computed: int = 0

    @property
    def saved_share(self) -> float:
        """Share of the block forwards that was spared, 0 to 1."""
        return 1.0 - self.computed / self.blocks if self.blocks else 0.0


@dataclass(slots=True)
class _Forward:
    """One forward under way: outputs to hand out, outputs computed, by name of the block."""

    skipped: Mapping[str, Entry] = field(default_factory=dict)
    computed: dict[str, Entry] = field(default_factory=dict)

    def require_intact(self) -> None:
        """Raises `UnsupportedError` if something wrote to an output after it was returned."""
        for name, entry in (*self.skipped.items(), *self.computed.items()):
            if not entry.is_intact:
                raise UnsupportedError(f"the model writes to what its block {name} returned")


_Key = tuple[Hashable, int, bytes]


class PrefixCache:
    """Block outputs of a model by allocation and batch, the least recently used dropped first.

    One cache serves one model on fixed batches, one forward at a time, in evaluation mode. Where
    a model does not allow it (a block runs twice, or hands on more than it returns) forwards run
    in full and `reason` says why.

    Args:
        module: the model that forwards run on; inside `sharing` its blocks are wrapped.
        layout: of the model.
        max_bytes: memory for outputs; 0 turns sharing off.
    """

    def __init__(
        self, module: nn.Module, layout: ModelLayout, max_bytes: int = DEFAULT_PREFIX_BYTES
    ) -> None:
        self._module, self._layout, self.max_bytes = module, layout, max_bytes
        self._start_empty()

    def _start_empty(self) -> None:
        self.counts = PrefixCounts()
        self.reason = "" if self.max_bytes else "no memory is set aside for it"
        self._plan: PrefixPlan | None = None
        self._kept_steps: frozenset[int] = frozenset()
        self._sizes: dict[tuple[Hashable, int], int] = {}
        self._entries: OrderedDict[_Key, Entry] = OrderedDict()
        self._n_bytes = 0
        self._forward: _Forward | None = None

    def __getstate__(self) -> tuple[nn.Module, ModelLayout, int]:
        """What another process needs: nothing that is kept."""
        return self._module, self._layout, self.max_bytes

    def __setstate__(self, state: tuple[nn.Module, ModelLayout, int]) -> None:
        self._module, self._layout, self.max_bytes = state
        self._start_empty()

    @property
    def n_bytes(self) -> int:
        """Bytes that are kept now."""
        return self._n_bytes

    def clear(self) -> None:
        """Drop all outputs, e.g. because something may have written to weights."""
        self._entries.clear()
        self._n_bytes = 0

    @contextmanager
    def sharing(self, allocation: Allocation, part: Hashable) -> Iterator[None]:
        """Within the block, forwards of the model share what earlier ones computed.

        The n-th forward inside is taken to read the n-th batch of `part`. On leaving, the modules
        are as they were; after an exception nothing is kept.

        Args:
            allocation: what the model computes with inside.
            part: names the batches, which must be the same and in the same order each time.
        """
        if self.reason:
            yield
            return
        trial = _Trial(self, allocation, part)
        with ExitStack() as stack:
            for name in self._layout.blocks:
                stack.enter_context(_wrapped(self._module.get_submodule(name), self._run(name)))
            hooks = (
                self._module.register_forward_pre_hook(trial.before),
                self._module.register_forward_hook(trial.after, with_kwargs=True),
            )
            for hook in hooks:
                stack.callback(hook.remove)
            stack.callback(trial.close)
            try:
                yield
            except BaseException:
                self.clear()
                raise

    def _run(self, name: str) -> Callable[..., Output]:
        """The forward of block `name` with the original as its first argument."""

        def run(original: Callable[..., Output], *args: Any, **kwargs: Any) -> Output:
            forward = self._forward
            if forward is None:
                return original(*args, **kwargs)
            if name in forward.skipped:
                return forward.skipped[name].output
            output = original(*args, **kwargs)
            try:
                forward.computed[name] = Entry.of(output)
            except UnsupportedError as error:
                self.give_up(str(error))
            return output

        return run

    def give_up(self, reason: str) -> None:
        """Run all further forwards in full."""
        self.reason = reason
        self.clear()
        self._forward = None
        _log.info("Trials of this model do not share prefixes: %s.", reason)

    def find(self, plan: PrefixPlan, batch: Hashable, keys: Sequence[bytes]) -> dict[str, Entry]:
        """Outputs for the longest known prefix, by name of the skipped block."""
        for last in reversed(range(len(plan.steps))):
            resumed = plan.resumed_by(last)
            found = [self._entries.get((batch, step, keys[step])) for step in resumed]
            entries = [entry for entry in found if entry is not None]
            if len(entries) == len(resumed):
                self._touch(batch, keys[: last + 1])
                return _handed_out(plan, last, dict(zip(resumed, entries, strict=True)))
        return {}

    def _touch(self, batch: Hashable, keys: Sequence[bytes]) -> None:
        """The shallower a prefix, the more forwards share it: it is dropped last."""
        for step in reversed(range(len(keys))):
            if (batch, step, keys[step]) in self._entries:
                self._entries.move_to_end((batch, step, keys[step]))

    def keep(
        self,
        plan: PrefixPlan,
        batch: Hashable,
        keys: Sequence[bytes],
        computed: Mapping[str, Entry],
    ) -> None:
        """Keep the outputs of a forward, deepest first, so that the deepest are dropped first."""
        names = {step.name: index for index, step in enumerate(plan.steps)}
        entries = {names[name]: entry for name, entry in computed.items()}
        new = {(batch, step): entry.n_bytes for step, entry in entries.items()}
        if any(self._sizes.get(place) != n_bytes for place, n_bytes in new.items()):
            self._sizes.update(new)
            self._thin_out(plan)
        for step in sorted(self._kept_steps & entries.keys(), reverse=True):
            self._put((batch, step, keys[step]), entries[step])

    def _put(self, key: _Key, entry: Entry) -> None:
        self._drop(key)
        self._entries[key] = entry
        self._n_bytes += entry.n_bytes
        while self._n_bytes > self.max_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: _Key) -> None:
        entry = self._entries.pop(key, None)
        self._n_bytes -= entry.n_bytes if entry else 0

    def _thin_out(self, plan: PrefixPlan) -> None:
        """Keep every block's output, or every second or third one, as the memory allows."""
        per_step = [0] * len(plan.steps)
        for (_, step), n_bytes in self._sizes.items():
            per_step[step] += n_bytes
        for stride in range(1, len(plan.steps) + 1):
            kept = plan.every(stride)
            if _ALLOCATIONS * sum(per_step[step] for step in kept) <= self.max_bytes:
                break
        else:
            kept = frozenset()
        if kept != self._kept_steps:
            self._kept_steps = kept
            for key in [key for key in self._entries if key[1] not in kept]:
                self._drop(key)

    def count(self, plan: PrefixPlan, n_skipped: int) -> None:
        """Take a forward into account."""
        blocks = len(plan.steps)
        self.counts = PrefixCounts(
            self.counts.blocks + blocks, self.counts.computed + blocks - n_skipped
        )


class _Trial:
    """The forwards inside one `sharing`, told apart by their order."""

    def __init__(self, cache: PrefixCache, allocation: Allocation, part: Hashable) -> None:
        self._cache, self._allocation, self._part = cache, allocation, part
        self._n_forwards = 0
        self._keys: tuple[bytes, ...] | None = None
        self._trace: Trace | None = None
        self._checks = False

    def close(self) -> None:
        """Take the hooks of an unfinished trace off again."""
        self._cache._forward = None
        if self._trace is not None:
            self._trace.finish()
            self._trace = None

    def before(self, module: nn.Module, args: Any) -> None:  # noqa: ARG002 - torch's signature
        """A forward of the model starts."""
        cache = self._cache
        if self._checks:
            return
        self.close()  # what an earlier forward left that raised
        if cache.reason or torch.is_grad_enabled() or module.training:
            return
        cache._forward = _Forward()
        if cache._plan is None:
            self._trace = Trace(module, cache._layout)
            return
        batch = (self._part, self._n_forwards)
        cache._forward.skipped = cache.find(cache._plan, batch, self._known_keys(cache._plan))

    def after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """A forward of the model ends."""
        cache, forward = self._cache, self._cache._forward
        if self._checks:
            return
        batch = (self._part, self._n_forwards)
        self._n_forwards += 1
        if forward is None:
            return
        cache._forward = None
        try:
            forward.require_intact()
            if self._trace is not None:
                self._adopt(forward, partial(module, *args, **kwargs), output)
        except UnsupportedError as error:
            cache.give_up(str(error))
        if cache._plan is not None and not cache.reason:
            cache.count(cache._plan, len(forward.skipped))
            cache.keep(cache._plan, batch, self._known_keys(cache._plan), forward.computed)

    def _known_keys(self, plan: PrefixPlan) -> tuple[bytes, ...]:
        if self._keys is None:
            self._keys = _keys(plan, self._allocation)
        return self._keys

    def _adopt(self, forward: _Forward, again: Callable[[], Any], output: Any) -> None:
        """Make a plan of the first forward, if skipping half of its blocks gives its very output.

        Raises:
            UnsupportedError: it does not, or blocks run in an order that allows no plan.
        """
        assert self._trace is not None  # by the caller
        trace, self._trace = self._trace, None
        cache, plan = self._cache, make_plan(trace.finish(), self._cache._layout)
        last = len(plan.steps) // 2
        resumed = {step: forward.computed[plan.steps[step].name] for step in plan.resumed_by(last)}
        skipping = _Forward(_handed_out(plan, last, resumed))
        cache._forward, self._checks = skipping, True
        try:
            got = again()
        finally:
            cache._forward, self._checks = None, False
        skipping.require_intact()
        if not equal_outputs(got, output):
            raise UnsupportedError(
                f"a forward that skips its blocks up to {plan.steps[last].name} gives other outputs"
            )
        cache._plan = plan


def _handed_out(plan: PrefixPlan, last: int, resumed: Mapping[int, Entry]) -> dict[str, Entry]:
    """For each block up to step `last` the output of the last skipped block of its stack."""
    by_stack = {plan.steps[step].stack: entry for step, entry in resumed.items()}
    return {step.name: by_stack[step.stack] for step in plan.steps[: last + 1]}


@contextmanager
def _wrapped(block: nn.Module, run: Callable[..., Output]) -> Iterator[None]:
    before = block.__dict__.get("forward")
    block.forward = partial(run, block.forward)
    try:
        yield
    finally:
        if before is None:
            del block.forward
        else:
            block.forward = before


def _keys(plan: PrefixPlan, allocation: Allocation) -> tuple[bytes, ...]:
    """For each step a digest of the schemes of all layers that compute up to its end."""
    state = hashlib.blake2b(digest_size=16)
    keys = []
    for step in plan.steps:
        for name in step.layers:
            if name in allocation:
                state.update(f"{name}={allocation[name]}\n".encode())
        keys.append(state.digest())
    return tuple(keys)
