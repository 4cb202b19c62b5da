"""Stored tensors that no compression writes, told without decoding a matrix.

Shapes and dtypes are the loader's business; here it is what the numbers may be. Most codes can be
any, and finite scales that are wrong cannot be told from right ones.
"""

from __future__ import annotations

from collections.abc import Iterator

from autocompress.core.scheme import Scheme
from autocompress.methods.coding import Damage, Stored, is_finite
from autocompress.methods.schemes import Plan, plan
from autocompress.methods.storage import RESIDUAL, TRANSFORM, WIDTH, under


def damage_of(tensors: Stored, scheme: Scheme, shape: tuple[int, int]) -> Damage | None:
    """The first of a layer's stored tensors that is not as any compression writes it, or None.

    Args:
        tensors: of the layer (o, d), all or those that it stores itself.
        scheme: of the layer.
        shape: (o, d).
    """
    return next(_damages(tensors, plan(scheme), shape), None)


def _damages(tensors: Stored, ready: Plan, shape: tuple[int, int]) -> Iterator[Damage]:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            yield Damage(name, "must be finite, but holds NaN or infinity")
    if ready.width is not None and tensors:
        bits = ready.width.method.damage(under(WIDTH, tensors), ready.width.options)
        yield from () if bits is None else (bits.under(WIDTH),)
    yield from _of_codes(tensors, ready.inside, ready.narrow(shape))


def _of_codes(tensors: Stored, ready: Plan, shape: tuple[int, int]) -> Iterator[Damage]:
    for prefix, matrix in ready.matrices(shape).items():
        found = ready.storage(matrix).damage(under(prefix, tensors))
        if found is not None:
            yield found.under(prefix)
    for prefix, step in ((RESIDUAL, ready.residual), (TRANSFORM, ready.transform)):
        stored = under(prefix, tensors)
        if step is not None and stored:
            found = step.method.damage(stored, shape, step.options)
            if found is not None:
                yield found.under(prefix)
