import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from autocompress.core.errors import UsageError
from autocompress.search.run_trial import run_trial
from autocompress.search.shipping import pack_context
from autocompress.testing.driver_contract import scripted, scripted_context, value_of


@pytest.fixture
def context(tmp_path):
    return scripted_context(tmp_path)


def rebuilt(context):
    """As in another process: the parts go through a pickle, the arrays with them."""
    return pickle.loads(pickle.dumps(pack_context(context))).build()


def test_a_shipped_context_measures_the_same(context):
    request = scripted(0, "rtn(bits=3,group_size=16)")
    there = run_trial(request, context=rebuilt(context))
    assert value_of(there) == value_of(run_trial(request, context=context))


def test_packing_and_building_copy_no_tensor(context):
    parts = pack_context(context)
    built = parts.build()
    for name, parameter in context.module.named_parameters():
        assert built.module.get_parameter(name).data_ptr() == parameter.data_ptr()
    reference, original = built.reference["outputs"], context.reference["outputs"]
    assert reference.data_ptr() == original.data_ptr()
    assert parts.n_bytes < 3 * context.layout.base_bytes
    assert len(parts.skeleton) < 20_000


def test_parameters_and_buffers_of_every_kind_arrive(context):
    built = rebuilt(context)
    assert torch.equal(built.module.gain, context.module.gain)  # not in the state dict
    for (name, there), (_, here) in zip(
        built.module.named_parameters(), context.module.named_parameters(), strict=True
    ):
        assert type(there) is torch.nn.Parameter, name
        assert not there.requires_grad
        assert torch.equal(there, here)


def test_the_bank_reads_the_memory_of_the_model(context):
    parts = pack_context(context)
    built = parts.build()
    weight = built.module.get_submodule("first").weight
    assert built.bank._weights["first"].data_ptr() == weight.data_ptr()


def test_read_only_arrays_build_without_a_warning(context):
    parts = pack_context(context)
    for array in parts.arrays:
        array.flags.writeable = False
    assert run_trial(scripted(0, "rtn(bits=4)"), context=parts.build()).is_complete


def test_a_task_that_cannot_travel_is_refused_with_advice(context):
    class Inside(type(context.task)):
        pass

    with pytest.raises(UsageError, match=r"can be pickled.*Inside.*--driver local"):
        pack_context(replace(context, task=Inside()))


def test_what_was_on_the_cpu_needs_no_gpu(context):
    assert not pack_context(context).needs_gpu


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "gpt2", "bert", "bart", "t5", "vit", "gemma3"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_models_arrive_with_their_ties_and_give_the_same_outputs(context, family, dtype):
    from autocompress.testing.tiny_models import tiny_batches, tiny_model

    model = tiny_model(family).eval().to(dtype)
    parts = pickle.loads(pickle.dumps(pack_context(replace(context, module=model))))
    there = parts.build().module
    batch = {
        k: v.to(dtype) if v.is_floating_point() else v
        for k, v in next(iter(tiny_batches(family))).items()
    }
    with torch.no_grad():
        here_out, there_out = model(**batch), there(**batch)
    first = next(k for k in here_out if "logits" in k or "hidden" in k)
    assert torch.equal(here_out[first], there_out[first])
    shared = [[n for n, p in m.named_parameters(remove_duplicate=False)] for m in (model, there)]
    assert shared[0] == shared[1]
    distinct = [len({id(p) for p in m.parameters()}) for m in (model, there)]
    assert distinct[0] == distinct[1]
    assert all(isinstance(a, np.ndarray) and a.dtype == np.uint8 for a in parts.arrays)
