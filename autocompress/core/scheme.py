"""Schemes: how one layer is compressed, as a value."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from autocompress.core.digest import digest
from autocompress.core.errors import SchemeError

OptionValue = bool | int | float | str

_STAGE = re.compile(r"\s*([A-Za-z_][\w.-]*)\s*(?:\(([^()]*)\))?\s*$")


@dataclass(frozen=True, slots=True)
class Stage:
    """One method with its options: one step of a scheme.

    Attributes:
        method: name in the method registry.
        options: pairs sorted by name. The method validates them and fills in defaults, so equal
            stages are equal values once they went through `methods.canonical`.
    """

    method: str
    options: tuple[tuple[str, OptionValue], ...] = ()

    @classmethod
    def of(cls, method: str, options: Mapping[str, OptionValue] | None = None) -> Stage:
        """A stage with its options sorted by name."""
        return cls(method, tuple(sorted((options or {}).items())))

    def with_options(self, options: Mapping[str, OptionValue]) -> Stage:
        """The stage with some options set, the others as they are."""
        return Stage.of(self.method, {**dict(self.options), **options})

    def __str__(self) -> str:
        inner = ",".join(f"{name}={_show(value)}" for name, value in self.options)
        return f"{self.method}({inner})" if inner else self.method

    @classmethod
    def parse(cls, text: str) -> Stage:
        """Read ``gptq(bits=4,group_size=128)``; the inverse of ``str``.

        Raises:
            SchemeError: the text is not of that form.
        """
        match = _STAGE.match(text)
        if match is None:
            raise SchemeError(
                f"A stage is written method(option=value,...), but got {text!r}. "
                "Example: gptq(bits=4,group_size=128)."
            )
        options: dict[str, OptionValue] = {}
        for part in filter(None, (p.strip() for p in (match[2] or "").split(","))):
            name, equals, value = part.partition("=")
            if not equals:
                raise SchemeError(f"An option is written name=value, but got {part!r} in {text!r}.")
            options[name.strip()] = _read(value.strip())
        return cls.of(match[1], options)


@dataclass(frozen=True, slots=True)
class Scheme:
    """Stages in the order share, width, transform, factorize, sparsify, quantize, residual, inputs.

    The empty scheme, written ``base``, leaves the layer as it is.
    """

    stages: tuple[Stage, ...] = ()

    def __str__(self) -> str:
        return "+".join(str(stage) for stage in self.stages) or "base"

    @property
    def is_base(self) -> bool:
        """True if the layer is left as it is."""
        return not self.stages

    @property
    def digest(self) -> str:
        """Stable across processes; equal for equal schemes."""
        return digest(str(self))

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read ``svd_llm(rank=96)+gptq(bits=4)`` or ``base``; the inverse of ``str``."""
        return _parse_scheme(text)


BASE_SCHEME = Scheme()


@lru_cache(maxsize=65536)
def _parse_scheme(text: str) -> Scheme:
    if text.strip() == "base":
        return BASE_SCHEME
    return Scheme(tuple(Stage.parse(part) for part in text.split("+")))


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, float) else str(value)


def _read(text: str) -> OptionValue:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
