"""Pure: the option ``state``: outputs of a graph that the next row of the same sequence gets as inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.engines.onnx.runtime.options import StateInput
from pipeline.engines.onnx.runtime.run import Array
from pipeline.engines.onnx.runtime.signature import Dim, GraphValue, RowMode, Signature, fixed_batch
from storage.errors import InvalidJob

MOST_BYTES = 2**28
"""Of the zeros that an input begins with."""


@dataclass(frozen=True, slots=True)
class CarriedState:
    """``options``: graph input → the output that feeds it, and the shape of its zeros where the graph has none."""

    signature: Signature
    options: Mapping[str, str | StateInput]

    def __bool__(self) -> bool:
        return bool(self.options)

    @property
    def output_of(self) -> dict[str, str]:
        """Graph input → graph output."""
        return {name: said if isinstance(said, str) else said.output for name, said in self.options.items()}

    def check(self, mode: RowMode) -> None:
        """Raises :class:`~storage.errors.InvalidJob` for an input or output that the graph does not have, for two that
        do not go together, and for an input of unknown shape."""
        if self.options and mode == "stack" and fixed_batch(self.signature) is not None:
            raise _refused(min(self.options), f"rows run one by one, and the graph takes several: {self.signature}")
        inputs = {value.name: value for value in self.signature.inputs}
        outputs = {value.name: value for value in self.signature.outputs}
        given = {dim for name, value in inputs.items() if name not in self.options for dim in value.dims or ()}
        for name, output in self.output_of.items():
            if name not in inputs:
                raise _refused(name, f"the graph has no input {name!r}; it has {', '.join(inputs) or 'none'}")
            if output not in outputs:
                raise _refused(name, f"the graph has no output {output!r}; it has {', '.join(outputs)}")
            to, source = inputs[name], outputs[output]
            if to.dtype != source.dtype or not _go_together(to, source):
                raise _refused(name, f"the output {source} does not fit the input {to}")
            if to.dtype == np.object_:
                raise _refused(name, f"{to} holds strings, which have no zero to begin with")
            self._check_shape(to, mode, given)
        if not self.options:
            return
        feeds = list(self.output_of.values())
        if twice := {output for output in feeds if feeds.count(output) > 1}:
            raise _refused(min(self.options), f"the output {min(twice)!r} is named for two inputs")
        if len(self.options) == len(inputs):
            raise _refused(min(self.options), "an input is left that reads the rows; name fewer of them")
        if len(self.options) == len(outputs):
            raise _refused(min(self.options), "the graph has no other output, so there would be no result")

    def _check_shape(self, value: GraphValue, mode: RowMode, given: set[Dim]) -> None:
        shape, dims = self._shape(value.name), value.dims
        if shape is not None:
            if dims is not None and not _fits(shape, dims):
                raise _refused(value.name, f"the shape {list(shape)} does not fit the input {value}")
            if int(np.prod(shape, dtype=object)) * value.dtype.itemsize > MOST_BYTES:
                raise _refused(value.name, f"the shape {list(shape)} takes more than {MOST_BYTES >> 20} MiB")
            return
        sizes = dims if dims is None or mode == "whole" else (1, *dims[1:])
        if sizes is None or any(not isinstance(dim, int) and (dim is None or dim not in given) for dim in sizes):
            raise _refused(
                value.name,
                f"the graph leaves the shape of {value} open; say of which shape the zeros are that a sequence begins "
                f'with: {{"output": "{self.output_of[value.name]}", "shape": [2, 1, 128]}}',
            )

    def _shape(self, name: str) -> tuple[int, ...] | None:
        said = self.options[name]
        return None if isinstance(said, str) else said.shape

    def begin(self, mode: RowMode, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Zeros for the first row of a sequence. ``feed``: that row's other inputs, as the graph gets them."""
        sizes: dict[Dim, int] = {}
        for value in self.signature.inputs:
            if value.name in feed and value.dims is not None:
                sizes.update(zip(value.dims, feed[value.name].shape, strict=False))
        zeros = {}
        for value in self.signature.inputs:
            if value.name in self.options:
                shape = self._shape(value.name)
                if shape is None:
                    dims = list(value.dims or ())
                    if mode != "whole" and dims:
                        dims[0] = 1
                    shape = tuple(dim if isinstance(dim, int) else sizes[dim] for dim in dims)
                zeros[value.name] = np.zeros(shape, value.dtype)
        return zeros


@dataclass(slots=True)
class Sequences:
    """Where the sequences of one ``infer`` call are: the state that the last row of each left; ``None`` once a row of
    it failed. Rows of one call run one after the other, so nothing is locked."""

    states: dict[Any, dict[str, Array] | None] = field(default_factory=dict)


def _go_together(to: GraphValue, source: GraphValue) -> bool:
    if to.dims is None or source.dims is None:
        return True
    pairs = zip(to.dims, source.dims, strict=True) if len(to.dims) == len(source.dims) else None
    return pairs is not None and all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))


def _fits(shape: tuple[int, ...], dims: tuple[Dim, ...]) -> bool:
    return len(shape) == len(dims) and all(
        size == dim for size, dim in zip(shape, dims, strict=True) if isinstance(dim, int)
    )


def _refused(name: str, why: str) -> InvalidJob:
    return InvalidJob(why, field=f"engine_options.state.{name}")
