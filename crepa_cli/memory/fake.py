"""Fake tensors, twice as fast if operations recur with the same shapes, as they do in block after block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

DEVICE = torch.device("cpu")
DEPENDS_ON_CONTENT = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.inplace_view,
}
Key = tuple[object, ...]


class Result(NamedTuple):
    """A tensor that an operation returns; `is_view` if it shares the storage of the first argument."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    is_view: bool


class QuickFakeMode(FakeTensorMode):
    """A FakeTensorMode that remembers the shapes of results.

    FakeTensorMode remembers them too, but it takes most of its time to describe the arguments completely. Here only
    operations are remembered that change no argument, on CPU tensors without known content.
    """

    _results: dict[Key, Result | tuple[Result, ...] | None] = {}
    _pure: dict[OpOverload, bool] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        if func not in self._pure:
            self._pure[func] = _is_pure(func)
        key = (func, *_described(args), *_described((kwargs or {}).items())) if self._pure[func] else (None,)
        known = self._results.get(key)
        if known is not None:
            return (
                self._tensor(known, args) if isinstance(known, Result) else [self._tensor(one, args) for one in known]
            )
        returned = super().__torch_dispatch__(func, types, args, kwargs)
        if None not in key and key not in self._results:
            self._results[key] = _results_of(returned, args)
        return returned

    def _tensor(self, result: Result, args: Any) -> FakeTensor:
        shape, stride, offset, dtype, is_view = result
        with torch._C._DisableTorchDispatch():
            tensor = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            if is_view:
                tensor.set_(args[0].untyped_storage(), offset, shape, stride)
        return FakeTensor(self, tensor, DEVICE)


def _is_pure(func: Any) -> bool:
    """Whether the operation changes no argument, and the shapes of the arguments decide that of the result."""
    if not isinstance(func, OpOverload) or func.namespace != "aten" or func._schema.is_mutable:
        return False
    # Lifted tensors keep their content.
    return not DEPENDS_ON_CONTENT & set(func.tags) and not func.name().startswith("aten::lift")


def _described(values: Iterable[Any]) -> Iterator[object]:
    """The arguments as parts of a key; None for those that cannot be one."""
    for value in values:
        if isinstance(value, FakeTensor):
            ordinary = value.constant is None and value.fake_device == DEVICE
            yield (value.shape, value.stride(), value.storage_offset(), value.dtype) if ordinary else None
        elif isinstance(value, Tensor):
            yield None
        elif isinstance(value, (list, tuple)):
            inner = tuple(_described(value))
            yield None if None in inner else inner
        else:
            yield type(value), value


def _results_of(returned: Any, args: Any) -> Result | tuple[Result, ...] | None:
    """The results as they can be made again; None if they cannot."""
    if isinstance(returned, FakeTensor):
        return _result(returned, args)
    if not isinstance(returned, (list, tuple)):
        return None
    results = [_result(one, args) for one in returned if isinstance(one, FakeTensor)]
    known = tuple(one for one in results if one is not None)
    return known if len(known) == len(returned) else None


def _result(tensor: FakeTensor, args: Any) -> Result | None:
    if tensor.constant is not None or tensor.fake_device != DEVICE:
        return None
    storage = tensor.untyped_storage()
    given = [one for one in torch.utils._pytree.tree_leaves(args) if isinstance(one, Tensor)]
    sharing = [one for one in given if one.untyped_storage()._cdata == storage._cdata]
    result = Result(tensor.shape, tensor.stride(), int(tensor.storage_offset()), tensor.dtype, is_view=bool(sharing))
    if sharing:
        return result if sharing[0] is args[0] and all(one is not tensor for one in sharing) else None
    alone = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    same = result.offset == 0 and alone.untyped_storage().nbytes() == storage.nbytes()
    return result if same else None
