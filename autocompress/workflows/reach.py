"""What calibration tokens reach: which layers read one tensor, which experts they are sent to."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from autocompress.core import LayerSpec, digest
from autocompress.core.errors import SpaceError
from autocompress.core.files import write_atomically
from autocompress.evaluate import Split, Task
from autocompress.methods import METHODS, Needs, needs
from autocompress.models.layout import unnamed_roles
from autocompress.models.loading import BaseModel
from autocompress.models.reads import as_read, called_of, reads_of
from autocompress.models.routing import count_routed
from autocompress.native.build import missing
from autocompress.spaces import SearchSpace

if TYPE_CHECKING:
    from autocompress.workflows.session import Session

_log = logging.getLogger(__name__)

CALIBRATION_BATCH = 8
_FIRST_TOKENS = 32
_NAMED = 3
_TOKENS_PER_INPUT = 2


def described_as_read(
    base: BaseModel, task: Task, calibration: Split
) -> tuple[BaseModel, frozenset[str]]:
    """The model with a layout whose layers share inputs as they do on the longest sequence.

    Of text its first tokens are enough. The same in every process that opens the same model and
    tokens.

    Returns:
        It, and the names of the layers that read nothing in that forward.
    """
    if unnamed := unnamed_roles(base.layout):
        _log.warning("%s", unnamed)
    batch = task.batches(calibration, 1)[0]
    start = {name: t[:, :_FIRST_TOKENS] if t.ndim == 2 else t for name, t in batch.items()}
    reads = reads_of(base.module, base.layout, start)
    unread = frozenset(layer.name for layer in base.layout.layers) - reads.keys()
    return replace(base, layout=as_read(base.layout, reads)), unread


def routed_tokens(session: Session) -> Mapping[str, int]:
    """Calibration tokens that are sent to each layer of an expert, counted once."""
    base, split = session.base, session.splits.calibration
    if not any(layer.expert is not None for layer in base.layout.layers):
        return {}

    def count() -> dict[str, int]:
        session.progress.step(f"Counting which experts {split.n_tokens:,} tokens are sent to")
        batches = session.task.batches(split, CALIBRATION_BATCH)
        return count_routed(base.module, base.layout, batches)

    return cast(dict[str, int], _found_once(session, "routing", count))


def layer_needs(space: SearchSpace) -> dict[str, Needs]:
    """The statistics that the most demanding option of each layer wants."""
    wanted: dict[str, Needs] = {}
    for choice in space.choices:
        for option in choice.options:
            for name, scheme in zip(choice.layers, option.schemes, strict=True):
                wanted[name] = max(wanted.get(name, Needs.NONE), needs(scheme))
    return wanted


def few_tokens(session: Session) -> str:
    """What to say where layers have few calibration tokens for each of their inputs; else empty."""
    n_tokens, layout = session.splits.calibration.n_tokens, session.base.layout
    fitted = [name for name, want in layer_needs(session.space).items() if want is Needs.HESSIAN]
    widths = [layout.layer(name).in_features for name in fitted]
    wide = [width for width in widths if n_tokens < _TOKENS_PER_INPUT * width]
    if not wide:
        return ""
    return (
        f"{len(wide)} of {len(fitted)} layers have fewer than {_TOKENS_PER_INPUT} calibration "
        f"tokens for each input ({n_tokens:,} for up to {max(wide):,}): more compress them better, "
        f"e.g. --calibration-tokens {2 * _TOKENS_PER_INPUT * max(wide)}"
    )


def slow_methods(space: SearchSpace) -> str:
    """What to say where methods of the space lack their compiled part; else empty."""
    reason = missing()
    stages = (
        s for c in space.choices for o in c.options for each in o.schemes for s in each.stages
    )
    names = sorted({s.method for s in stages if METHODS[s.method].compiled}) if reason else []
    if not names:
        return ""
    return (
        f"Compressing by {' and '.join(names)} takes about a hundred times as long as it could: "
        f"{reason}. Next step: install a C compiler (gcc or clang), or take --space mixed_precision"
    )


def reached_space(session: Session, space: SearchSpace) -> SearchSpace:
    """`space` without the choices about layers that no calibration token reaches.

    Nothing would say what they are worth, so their bits would look free: those of the images of a
    model that is searched with text. They stay as they are.

    Raises:
        SpaceError: nothing but the base is left.
    """
    never = _unreached(session)
    gone = never.intersection(space.searched_layers)
    if not gone:
        return space
    choices = tuple(c for c in space.choices if gone.isdisjoint(c.layers))
    layers = session.base.layout.layers
    where = _parts([x.name for x in layers if x.name in gone], {x.name for x in layers} - never)
    if all(option.is_base for c in choices for option in c.options):
        raise SpaceError(
            f"A space must offer something for layers that calibration tokens reach, but of "
            f"{space.name!r} nothing is left: they do not reach {where}. Next step: another "
            "--space, or --task and --data that use those layers."
        )
    n_searched = len(space.searched_layers)
    _log.warning(
        "Left as they are: %d of %d layers of the space %s (%s). No calibration token goes "
        "through them, so what compressing them damages cannot be told. Next step if they should "
        "be compressed: --task and --data that use them.",
        n_searched - sum(len(choice.layers) for choice in choices),
        n_searched,
        space.name,
        where,
    )
    return replace(space, choices=choices)


def _unreached(session: Session) -> frozenset[str]:
    """Names of the layers that no calibration token reaches.

    An expert is not among them if any of its block's experts is reached: that it got no token is
    chance, and what methods do then is their affair.
    """
    if not session.unread:
        return frozenset()

    def look() -> list[str]:
        base, split = session.base, session.splits.calibration
        left = {x.name: x for x in base.layout.layers if x.name in session.unread}
        seen = {_stack(x) for x in base.layout.layers if x.name not in left}
        for batch in session.task.batches(split, CALIBRATION_BATCH):
            left = {name: layer for name, layer in left.items() if _stack(layer) not in seen}
            if not left:
                break
            seen |= {_stack(left[name]) for name in called_of(base.module, left.values(), batch)}
        return sorted(name for name, layer in left.items() if _stack(layer) not in seen)

    return frozenset(_found_once(session, "unreached", look))


def _stack(layer: LayerSpec) -> str:
    """What is reached together: all experts of a block, else the layer alone."""
    return layer.name if layer.expert is None else layer.name.rsplit(".", 2)[0]


def _parts(names: Iterable[str], others: Collection[str]) -> str:
    """The largest modules that hold some of `names` and none of `others`, for people."""
    tops = dict.fromkeys(_top(name.split("."), others) for name in names)
    shown = ", ".join(list(tops)[:_NAMED])
    return shown if len(tops) <= _NAMED else f"{shown} and {len(tops) - _NAMED} more"


def _top(parts: list[str], others: Collection[str]) -> str:
    above = (".".join(parts[:n]) for n in range(1, len(parts)))
    alone = (top for top in above if not any(name.startswith(f"{top}.") for name in others))
    return next((f"{top}.*" for top in alone), ".".join(parts))


def _found_once(session: Session, what: str, find: Callable[[], Any]) -> Any:
    """What `find` gives for the model and the calibration tokens, kept in the cache."""
    key = digest([what, 1, session.base.digest, session.splits.calibration.digest])
    path = session.cache / what / f"{key}.json"
    with suppress(OSError, ValueError):  # absent or damaged: found again
        return json.loads(path.read_text("utf-8"))
    found = find()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(found))
    return found
