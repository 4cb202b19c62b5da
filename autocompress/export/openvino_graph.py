"""An OpenVINO model from a torch one, with compressed layers in place of dense ones.

The model is traced in float32. OpenVINO's constants share memory with the traced tensors, so that a
layer's constant is known by its address; it is replaced by what decompresses the stored codes, or
two products of thin matrices, after a rotation of what it is applied to where the codes are in a
rotated basis. A tied embedding and head stay one constant.

The cache of a causal model becomes state, as in the models of optimum-intel: the inputs are
``input_ids``, ``attention_mask``, ``position_ids`` and ``beam_idx``, and the keys, and the values,
of each block are a variable.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import openvino
import torch
from openvino import opset13 as ops
from openvino._offline_transformations import apply_make_stateful_transformation
from openvino.frontend import FrontEndManager, OpConversionFailure
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch import Tensor, nn

from autocompress.core.errors import CheckpointError, UsageError
from autocompress.export.openvino_forms import Form, example_of
from autocompress.export.openvino_rotation import Rotation
from autocompress.export.openvino_weights import FLOATS, StoredMatrix, nibbles, plain
from autocompress.models.quiet import quiet_transformers

BEAM = "beam_idx"
_NEXT = "Next step: export --format packed, which holds every model."


def converted(model: nn.Module, form: Form) -> Any:
    """The OpenVINO model of a float32 torch model; its constants share memory with it.

    The frontend is called without ``openvino.convert_model``, which reports use to its makers and
    folds constants that must be found again.

    Raises:
        UsageError: the frontend cannot convert the model.
    """
    module, example = example_of(model, form)
    try:
        with warnings.catch_warnings(), torch.no_grad(), quiet_transformers():
            warnings.simplefilter("ignore")
            decoder = TorchScriptPythonDecoder(
                module, example_input=example, trace_kwargs={"check_trace": False}
            )
            frontend = FrontEndManager().load_by_framework("pytorch")
            graph = frontend.convert(frontend.load(decoder))
    except (OpConversionFailure, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"OpenVINO's frontend must convert the model, but cannot convert this "
            f"{type(model).__name__}: {str(error).strip().splitlines()[-1]} {_NEXT}"
        ) from error
    _name(graph.inputs, (*form.inputs, *form.past), "inputs")
    _name(graph.outputs, (*form.outputs, *form.present), "outputs")
    for port, (heads, width) in zip(graph.inputs[len(form.inputs) :], form.cache, strict=True):
        port.get_node().set_partial_shape(openvino.PartialShape([-1, heads, -1, width]))
    graph.validate_nodes_and_infer_types()
    return graph


def _name(ports: Any, names: tuple[str, ...], what: str) -> None:
    if len(ports) != len(names):
        raise UsageError(
            f"The converted model must have the {what} {', '.join(names)}, but has {len(ports)}. "
            f"{_NEXT}"
        )
    for port, name in zip(ports, names, strict=True):
        port.get_tensor().set_names({name})
        if what == "inputs":
            port.get_node().set_friendly_name(name)


def constants_by_address(graph: Any) -> dict[int, list[Any]]:
    """The float32 constants of a graph, by the address of their first byte."""
    found: dict[int, list[Any]] = {}
    for node in graph.get_ops():
        if node.get_type_name() == "Constant" and node.get_element_type() == openvino.Type.f32:
            found.setdefault(node.data.ctypes.data, []).append(node)
    return found


def replace_layer(
    nodes: list[Any], name: str, matrices: tuple[StoredMatrix, ...], rotation: Rotation | None
) -> None:
    """Let all that reads the dense weight of a layer read its compressed form.

    Args:
        nodes: the constants (o, d) that hold the weight.
        name: of the layer.
        matrices: one, or the factors A and B.
        rotation: into whose basis the inputs of the matrices go; None: they stay.

    Raises:
        CheckpointError: something reads a factorized or rotated weight that is no product and no
            lookup.
    """
    readers = [port for node in nodes for port in node.output(0).get_target_inputs()]
    leaves = (name,) if len(matrices) == 1 else (f"{name}.a", f"{name}.b")
    weights = [_decompressed(m, leaf) for m, leaf in zip(matrices, leaves, strict=True)]
    for port in readers:
        if len(weights) == 1 and rotation is None:
            port.replace_source_output(weights[0])
        else:
            _replace_reader(port, weights, rotation, name)


def _replace_reader(port: Any, weights: list[Any], rotation: Rotation | None, name: str) -> None:
    reader = port.get_node()
    kind = reader.get_type_name()
    if kind == "MatMul" and port.get_index() == 1 and reader.get_attributes()["transpose_b"]:
        found = reader.input_value(0)
        if rotation is not None:
            found = rotation.entered(found)
        for weight in reversed(weights):
            found = ops.matmul(found, weight, False, True).output(0)
    elif kind == "Gather" and port.get_index() == 0:
        found = ops.gather(weights[0], reader.input_value(1), reader.input_value(2)).output(0)
        for weight in weights[1:]:
            found = ops.matmul(found, weight, False, False).output(0)
        if rotation is not None:
            found = rotation.back(found)
    else:
        raise CheckpointError(
            "Factors and rotated matrices stand for a weight that is multiplied or looked up, but "
            f"layer {name} is read by a {kind}. {_NEXT}"
        )
    found.get_node().set_friendly_name(reader.get_friendly_name())
    reader.output(0).replace(found)


def shorten(nodes: list[Any], dtype: torch.dtype) -> None:
    """Store a constant that stays as it is in the dtype of the checkpoint."""
    kind = FLOATS.get(str(dtype).removeprefix("torch."), "f32")
    if kind == "f32":
        return
    for node in nodes:
        values = torch.from_numpy(node.data.copy())
        short = _constant(plain(values.view(1, -1), kind).data, list(node.shape), kind)
        readers = node.output(0).get_target_inputs()
        wide = ops.convert(short, "f32")
        wide.set_friendly_name(node.get_friendly_name())
        for port in readers:
            port.replace_source_output(wide.output(0))


def _decompressed(matrix: StoredMatrix, name: str) -> Any:
    """The output (o, d) float32 of the subgraph that decompresses `matrix`."""
    o, d = matrix.shape
    if matrix.scales is None:
        node = _constant(matrix.data, [o, d], matrix.element)
        node.set_friendly_name(name)
        return (node if matrix.element == "f32" else ops.convert(node, "f32")).output(0)
    n_groups = matrix.scales.shape[1]
    shape, per_group = ([o, d], [o, 1])
    if n_groups > 1:
        shape, per_group = [o, n_groups, d // n_groups], [o, n_groups, 1]
    codes = _constant(matrix.data, shape, matrix.element)
    codes.set_friendly_name(f"{name}.codes")
    values = ops.convert(codes, "f32")
    if matrix.zeros is not None:
        stored = nibbles(matrix.zeros) if matrix.zeros_element == "u4" else matrix.zeros
        zeros = _constant(stored, per_group, matrix.zeros_element)
        values = ops.subtract(values, ops.convert(zeros, "f32"))
    scales = ops.convert(_constant(matrix.scales, per_group, "f16"), "f32")
    values = ops.multiply(values, scales)
    if n_groups > 1:
        values = ops.reshape(values, ops.constant([o, d], openvino.Type.i64), False)
    values.set_friendly_name(name)
    return values.output(0)


def _constant(data: Tensor, shape: list[int], kind: str) -> Any:
    raw = data.contiguous().view(torch.uint8).flatten().numpy()
    tensor = openvino.Tensor(getattr(openvino.Type, kind), openvino.Shape(shape))
    tensor.data.reshape(-1).view("uint8")[:] = raw
    return openvino.op.Constant(tensor)


def make_stateful(graph: Any, form: Form) -> None:
    """Keep keys and values between calls; ``beam_idx`` says which sequence each one goes on from.

    A reset state is empty, for as many sequences as ``input_ids`` has.
    """
    ports = {port.any_name: port for port in graph.inputs}
    beam = ops.parameter([-1], openvino.Type.i32, name=BEAM)
    beam.output(0).get_tensor().set_names({BEAM})
    for name in form.past:
        readers = list(ports[name].get_target_inputs())
        chosen = ops.gather(ports[name], beam, ops.constant(0, openvino.Type.i64))
        for port in readers:
            port.replace_source_output(chosen.output(0))
    graph.add_parameters([beam])
    pairs: Mapping[str, str] = dict(zip(form.past, form.present, strict=True))
    apply_make_stateful_transformation(graph, pairs)
    shape = ops.shape_of(ports["input_ids"], "i64")
    zero = ops.constant(0, openvino.Type.i64)
    batch = ops.gather(shape, ops.constant([0], openvino.Type.i64), zero)
    for node in _states(graph):
        _, heads, _, width = (axis.get_max_length() for axis in node.get_output_partial_shape(0))
        rest = ops.constant([heads, 0, width], openvino.Type.i64)
        empty = ops.broadcast(ops.constant(0.0, openvino.Type.f32), ops.concat([batch, rest], 0))
        node.set_arguments([empty])
    graph.validate_nodes_and_infer_types()


def _states(graph: Any) -> Iterator[Any]:
    return (node for node in graph.get_ops() if node.get_type_name() == "ReadValue")
