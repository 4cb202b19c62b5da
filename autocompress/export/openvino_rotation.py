"""Rotated bases in OpenVINO graphs: what enters the product of a layer, and what a lookup gives.

``x T = A X B`` with X the signed x as (p, q): two products by small matrices, whose cost is p + q
for each entry. Weights stay in the rotated basis, so that they stay codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
import torch
from openvino import opset13 as ops
from torch import Tensor

from autocompress.methods.hadamard import factors


class Rotation:
    """``T = diag(signs) (C_m x H_n)`` in one graph, whose layers share what it is made of.

    Args:
        d: width of what is rotated.
        seed: of the signs.
    """

    def __init__(self, d: int, seed: int) -> None:
        left, right, signs = factors(d, seed, torch.float32, torch.device("cpu"))
        self._parts = len(left), len(right)
        self._left, self._left_back, self._right = map(_constant, (left, left.T, right))
        # A second conversion: the plugin folds no single one from i8, and would run it each time.
        small = ops.convert(ops.constant(signs.numpy().astype(np.int8)), "i32")
        self._signs = ops.convert(small, "f32")
        self._entered: dict[tuple[str, int], Any] = {}

    def entered(self, rows: Any) -> Any:
        """``x T`` of an output (..., d); one node for all that read it."""
        key = rows.get_node().get_name(), rows.get_index()
        if key not in self._entered:
            signed = ops.multiply(rows, self._signs).output(0)
            self._entered[key] = self._mixed(signed, self._left)
        return self._entered[key]

    def back(self, rows: Any) -> Any:
        """``y T^T`` of an output (..., d) in the rotated basis."""
        return ops.multiply(self._mixed(rows, self._left_back), self._signs).output(0)

    def _mixed(self, rows: Any, left: Any) -> Any:
        same = [0] * (rows.get_partial_shape().rank.get_length() - 1)
        p, q = self._parts
        parts = ops.reshape(rows, _sizes([*same, p, q]), True)
        # B is symmetric, and weights that are transposed are what the plugin takes as they are.
        mixed = ops.matmul(left, ops.matmul(parts, self._right, False, True), False, False)
        return ops.reshape(mixed, _sizes([*same, p * q]), True).output(0)


def _constant(matrix: Tensor) -> Any:
    return ops.constant(matrix.contiguous().numpy())


def _sizes(sizes: list[int]) -> Any:
    return ops.constant(sizes, openvino.Type.i64)
