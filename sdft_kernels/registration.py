"""Puts an operator of this package into torch's library.

`torch.library.custom_op` would do the same, but the first call of what it makes imports torch's compiler, and that
takes seconds and 150 MiB in programs that compile nothing.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from itertools import islice
from typing import Any, TypeVar

import torch

from sdft_kernels._compat import leave_uncompiled

Result = TypeVar("Result")

#: It holds the operators for as long as the package is imported.
LIBRARY = torch.library.Library("sdft_kernels", "FRAGMENT")


def operator(name: str, function: Callable[..., Any], *, mutates_args: Sequence[str] = ()) -> Any:
    """The operator `sdft_kernels::name`, which runs `function` on every device; its schema is the function's."""
    schema = torch.library.infer_schema(function, mutates_args=mutates_args)
    LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    leave_uncompiled(function)
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    return getattr(torch.ops.sdft_kernels, name).default


def flat(function: Callable[..., Result]) -> Callable[..., Result]:
    """The function as an operator can run it: with an argument for each field of a dataclass, all by position.

    An operator's schema has numbers, texts and tensors, and no objects.
    """
    types = typing.get_type_hints(function)
    returned = types.pop("return")
    names = {name: _names(name, kind) for name, kind in types.items()}
    made: dict[str, Any] = {name: kind if is_dataclass(kind) else None for name, kind in types.items()}

    def of_values(*values: Any) -> Result:
        given = iter(values)
        return function(
            *(next(given) if kind is None else kind(*islice(given, len(names[name]))) for name, kind in made.items())
        )

    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)
        for arguments in names.values()
        for name, annotation in arguments.items()
    ]
    signature = inspect.Signature(parameters, return_annotation=returned)
    of_values.__signature__ = signature  # type: ignore[attr-defined]  # inspect's protocol; functions declare none
    return of_values


def _names(name: str, kind: Any) -> dict[str, Any]:
    """The operator's arguments for one parameter of its function, with their types."""
    if not is_dataclass(kind):
        return {name: kind}
    types = typing.get_type_hints(kind)
    return {field.name: types[field.name] for field in fields(kind)}


def values_of(*objects: Any) -> tuple[Any, ...]:
    """The fields of dataclasses as an operator takes them."""
    return tuple(getattr(given, field.name) for given in objects for field in fields(given))
