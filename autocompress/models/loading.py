"""Loads a base model, or says in one sentence why not and what to do."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from autocompress.core import digest, digest_bytes
from autocompress.core.errors import ModelError, nearest
from autocompress.models.experts import separate_experts
from autocompress.models.layout import ModelLayout, describe
from autocompress.models.quiet import quiet_transformers
from autocompress.models.sources import (
    check_folder,
    hub_is_offline,
    nearest_folders,
    resolve_source,
)

_log = logging.getLogger(__name__)

AUTO_CLASSES: Mapping[str, str] = {
    "AutoModelForCausalLM": "causal-lm",
    "AutoModelForMaskedLM": "masked-lm",
    "AutoModelForSeq2SeqLM": "seq2seq-lm",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForImageClassification": "image-classification",
    "AutoModel": "feature-extraction",
}
"""Auto classes that a base model can be loaded with, and the task that each is for."""

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_TOKENIZER_FILES = ("tokenizer*", "vocab.*", "spiece.model", "sentencepiece*", "merges.txt")
_IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
# Parts of a config that differ between equal models.
_VOLATILE = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype")


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A model to compress.

    Attributes:
        module: in evaluation mode, without gradients. Never write to its tensors.
        layout: its layers, blocks and bytes.
        processor: tokenizer or image processor; None if the source has none.
        source: absolute path of the folder, or hub id.
        auto_class: name of the transformers Auto class that loaded it.
        digest: of the weights as loaded (dtype included) and of the config: equal content, equal
            digest, in every process.
    """

    module: nn.Module
    layout: ModelLayout
    processor: Any
    source: str
    auto_class: str
    digest: str


def load_base_model(
    source: str,
    auto_class: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> BaseModel:
    """Load a model from a local folder or from the hub.

    Args:
        source: folder, or hub id.
        auto_class: one of `AUTO_CLASSES`.
        dtype: of the module; ``auto`` takes the checkpoint's. The cast happens while loading, so
            that buffers such as rotary frequencies keep their own dtype.
        device: where the module goes.
        trust_remote_code: allow code that ships with the checkpoint to run.

    Raises:
        ModelError: the source does not exist or is damaged; its architecture or its weights do not
            fit the Auto class; it is already quantized; a weight is NaN or infinite.
    """
    _require_one_of("dtype", dtype, _DTYPES)
    _require_one_of("Auto class", auto_class, tuple(AUTO_CLASSES))
    if refusal := device_refusal(device):
        raise ModelError(refusal)
    source = resolve_source(source)
    config = load_config(source, trust_remote_code=trust_remote_code)
    if Path(source).is_dir():
        check_folder(Path(source))
    _require_uncompressed(source, config)
    _require_fitting_task(source, config, auto_class)
    module = _load_module(source, config, auto_class, dtype, trust_remote_code)
    _require_finite(source, module)
    separate_experts(module)
    module.requires_grad_(False).eval().to(device)
    return BaseModel(
        module=module,
        layout=describe(module),
        processor=load_processor(source, trust_remote_code=trust_remote_code),
        source=source,
        auto_class=auto_class,
        digest=model_digest(module),
    )


def load_config(source: str, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a model.

    Raises:
        ModelError: there is none, it cannot be read, or its architecture is unknown.
    """
    source = resolve_source(source)
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        check_folder(Path(source))
    with _as_model_error(source, "its config cannot be read"):
        return hf.AutoConfig.from_pretrained(
            source, trust_remote_code=trust_remote_code, local_files_only=_local_only(source)
        )


def load_processor(source: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer, or for a vision model the image processor; None if a folder has none.

    Raises:
        ModelError: it is there but cannot be loaded.
    """
    source = resolve_source(source)
    config = load_config(source, trust_remote_code=trust_remote_code)
    sees = type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    files = _IMAGE_PROCESSOR_FILES if sees else _TOKENIZER_FILES
    folder = Path(source)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in files):
        return None
    options = {"trust_remote_code": trust_remote_code, "local_files_only": _local_only(source)}
    with _as_model_error(source, "its tokenizer or image processor cannot be loaded"):
        if sees:
            # One backend, so that numbers do not depend on whether torchvision is installed.
            return hf.AutoImageProcessor.from_pretrained(source, backend="pil", **options)
        return hf.AutoTokenizer.from_pretrained(source, **options)


def model_digest(module: nn.Module) -> str:
    """Digest of a model's config and of the content of its tensors, each tied tensor once."""
    tensors = {id(t): (n, t) for n, t in reversed(module.state_dict(keep_vars=True).items())}
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        contents = sorted(pool.map(_tensor_digest, tensors.values()))
    config = getattr(module, "config", None)
    settings = {} if config is None else config.to_dict()
    for name in _VOLATILE:
        settings.pop(name, None)
    return digest(
        [type(module).__name__, json.dumps(settings, sort_keys=True, default=str), contents]
    )


def _tensor_digest(named: tuple[str, Tensor]) -> list[Any]:
    name, tensor = named
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return [name, str(tensor.dtype), list(tensor.shape), digest_bytes(content.data)]


def _require_one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ModelError(f"Unknown {what} {value!r}. {nearest(value, known)}")


def device_refusal(device: str) -> str:
    """Why a torch device cannot be used here, and the next step; empty if it can."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        return f"Device {device!r} cannot be used here: {_first_line(error)}. Try --device cpu."
    return ""


def _require_uncompressed(source: str, config: Any) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = settings.get("quant_method", "an unknown method")
    raise ModelError(
        f"A base model must be uncompressed, but {source} is quantized with {method!r}. Give the "
        "model that it was made from. (An exported model is opened with autocompress.load.)"
    )


def _require_fitting_task(source: str, config: Any, auto_class: str) -> None:
    """Refuse a task for which the architecture, or this checkpoint's head, is not made."""
    if auto_class in (getattr(config, "auto_map", None) or {}):
        return
    fitting = _fitting_classes(config)
    if auto_class not in fitting:
        raise _wrong_task(source, config.model_type, auto_class, list(fitting))
    own = [name for name in _own_classes(config) if name != "AutoModel"]
    if own and auto_class not in (*own, "AutoModel"):
        raise _wrong_task(source, config.architectures[0], auto_class, own)


def _fitting_classes(config: Any) -> dict[str, set[str]]:
    """Auto classes that know the architecture, with the names of the classes that they build.

    An encoder-decoder that transformers also offers for filling masks is one for seq2seq.
    """
    mappings = {name: getattr(hf, name)._model_mapping for name in AUTO_CLASSES}
    if getattr(config, "is_encoder_decoder", False):
        del mappings["AutoModelForMaskedLM"]
    found = {n: m[type(config)] for n, m in mappings.items() if type(config) in m}
    return {
        name: {c.__name__ for c in (classes if isinstance(classes, tuple) else (classes,))}
        for name, classes in found.items()
    }


def _own_classes(config: Any) -> list[str]:
    """Auto classes that build what the checkpoint says it is."""
    stated = set(getattr(config, "architectures", None) or ())
    return [name for name, classes in _fitting_classes(config).items() if stated & classes]


def _wrong_task(source: str, made_for: str, auto_class: str, fitting: list[str]) -> ModelError:
    tasks = " or ".join(f"--task {AUTO_CLASSES[name]}" for name in fitting) or "another model"
    return ModelError(
        f"The model must be made for the task {AUTO_CLASSES[auto_class]!r} ({auto_class}), but "
        f"{source} is {made_for!r}. Use {tasks}."
    )


def _load_module(
    source: str, config: Any, auto_class: str, dtype: str, trust_remote_code: bool
) -> nn.Module:
    options = {
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        "trust_remote_code": trust_remote_code,
        "local_files_only": _local_only(source),
        "use_safetensors": True,
        "ignore_mismatched_sizes": True,  # reported below, by name
        "output_loading_info": True,
    }
    load = getattr(hf, auto_class).from_pretrained
    with _as_model_error(source, "its weights cannot be loaded"):
        module, info = load(source, **options)
        if _lacks_only_a_pooler(module, info["missing_keys"]):
            # The pooler of a plain encoder would be random, and its output is not used.
            module, info = load(source, **options, add_pooling_layer=False)
    if info["mismatched_keys"]:
        raise _mismatched(source, info["mismatched_keys"])
    if info["missing_keys"]:
        made_for = _own_classes(config)
        raise _untrained(source, module, auto_class, info["missing_keys"], made_for)
    if info["unexpected_keys"]:
        _log.info("%s: not used by %s: %s", source, auto_class, sorted(info["unexpected_keys"]))
    result: nn.Module = module
    return result


def _mismatched(source: str, keys: set[tuple[str, Any, Any]]) -> ModelError:
    name, stored, expected = min(keys)
    return ModelError(
        f"The weights must have the shapes that config.json says, but {len(keys)} tensors of "
        f"{source} differ, e.g. {name!r}: stored {tuple(stored)}, expected {tuple(expected)}. "
        "The folder mixes files of two models: save or download it again."
    )


def _lacks_only_a_pooler(module: nn.Module, missing: set[str]) -> bool:
    parameters = inspect.signature(type(module).__init__).parameters
    poolers = all(name.startswith("pooler.") for name in missing)
    return bool(missing) and poolers and "add_pooling_layer" in parameters


def _untrained(
    source: str, module: nn.Module, auto_class: str, missing: set[str], made_for: list[str]
) -> ModelError:
    tasks = " or ".join(f"--task {AUTO_CLASSES[name]}" for name in made_for)
    return ModelError(
        f"A base model must be trained for its task, but {source} has no weights for "
        f"{len(missing)} tensors of {type(module).__name__}, e.g. {min(missing)!r}; they would be "
        f"random in {AUTO_CLASSES[auto_class]!r}. "
        + (f"Use {tasks}." if tasks else "Give a checkpoint that holds them.")
    )


def _require_finite(source: str, module: nn.Module) -> None:
    bad = [name for name, p in module.named_parameters() if not _is_finite(p)]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ModelError(
            f"Weights must be finite, but {source} has NaN or infinite values in "
            f"{', '.join(bad[:5])}{more}. Save or download the model again; a float16 checkpoint "
            "may have overflowed."
        )


def _is_finite(tensor: Tensor) -> bool:
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    extremes = torch.stack(torch.aminmax(tensor.detach()))  # NaN goes through, nothing is copied
    return bool(torch.isfinite(extremes).all())


def _local_only(source: str) -> bool:
    return Path(source).is_dir() or hub_is_offline()


@contextmanager
def _as_model_error(source: str, what: str) -> Iterator[None]:
    """Turn the many ways in which transformers refuses a checkpoint into one."""
    try:
        with quiet_transformers():
            yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(_refusal(source, what, error)) from error


def _refusal(source: str, what: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            f"{source} ships its own code, which runs only if you ask for it: read the code, then "
            "pass trust_remote_code=True (--trust-remote-code)."
        )
    if Path(source).is_dir():
        return f"{source} cannot be used as a model: {what}: {_first_line(error)}"
    return (
        f"{source!r} is neither a folder nor a model that the hub gives us ({what}: "
        f"{_first_line(error)}). Check the spelling, or download the model and give its folder. "
        f"{nearest_folders(source)}"
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
