"""Fake tensors, twice as fast if operations recur with the same shapes, as they do in block after block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

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
aten = torch.ops.aten
OF_MASKS = {aten._local_scalar_dense.default, aten.bitwise_not.default, aten.index.Tensor}
Key = tuple[object, ...]


class Result(NamedTuple):
    """A tensor that an operation returns: a new one, a view of the first argument, or that argument itself."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    source: Literal["new", "view", "itself"]


class QuickFakeMode(FakeTensorMode):
    """A FakeTensorMode that remembers the shapes of results, and in which masks choose everything.

    FakeTensorMode remembers them too, but it takes most of its time to describe the arguments completely. Here only
    operations are remembered that keep the shapes of their arguments, on CPU tensors without known content.

    A mask without content is true everywhere, as that of a caption without padding, and its inverse is nowhere.
    """

    _results: dict[Key, Result | tuple[Result, ...] | None] = {}
    _plain: dict[OpOverload, bool] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        if func in OF_MASKS and _is_mask(args):
            return self._of_mask(func, types, args, kwargs)
        if func not in self._plain:
            self._plain[func] = _is_plain(func)
        key = (func, *_described(args), *_described((kwargs or {}).items())) if self._plain[func] else (None,)
        known = self._results.get(key)
        if known is not None:
            if isinstance(known, Result):
                return self._tensor(known, args)
            return [self._tensor(one, args) for one in known]
        returned = super().__torch_dispatch__(func, types, args, kwargs)
        if None not in key and key not in self._results:
            self._results[key] = _results_of(returned, args)
        return returned

    def _of_mask(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func is aten._local_scalar_dense.default:
            return True
        if func is aten.bitwise_not.default:
            inverse: Any = super().__torch_dispatch__(func, types, args, kwargs)
            inverse.chooses_nothing = True
            return inverse
        tensor, (mask,) = args
        chosen = 0 if hasattr(mask, "chooses_nothing") else len(mask)
        return tensor.new_empty(chosen, *tensor.shape[1:])

    def _tensor(self, result: Result, args: Any) -> Any:
        shape, stride, offset, dtype, source = result
        if source == "itself":
            return args[0]
        with torch._C._DisableTorchDispatch():
            tensor = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            if source == "view":
                tensor.set_(args[0].untyped_storage(), offset, shape, stride)
        return FakeTensor(self, tensor, DEVICE)


def _is_mask(args: Any) -> bool:
    """Whether an operation of `OF_MASKS` is called on a mask, or with one that chooses along the first dimension."""
    mask = args[0]
    if len(args) == 2:
        mask = args[1][0] if len(args[1]) == 1 else None
    return isinstance(mask, FakeTensor) and mask.dtype == torch.bool and mask.constant is None and mask.ndim < 2


def _is_plain(func: Any) -> bool:
    """Whether the shapes of the arguments decide that of the result, and the operation changes none but the first."""
    if not isinstance(func, OpOverload) or func.namespace != "aten":
        return False
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments]
    # Lifted tensors keep their content.
    return not any(written[1:]) and not DEPENDS_ON_CONTENT & set(func.tags) and not func.name().startswith("aten::lift")


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
    facts = tensor.shape, tensor.stride(), int(tensor.storage_offset()), tensor.dtype
    if tensor is args[0]:
        return Result(*facts, "itself")
    storage = tensor.untyped_storage()
    given = [one for one in torch.utils._pytree.tree_leaves(args) if isinstance(one, Tensor)]
    sharing = [one for one in given if one.untyped_storage()._cdata == storage._cdata]
    if sharing:
        return Result(*facts, "view") if sharing[0] is args[0] and all(one is not tensor for one in sharing) else None
    alone = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    same = tensor.storage_offset() == 0 and alone.untyped_storage().nbytes() == storage.nbytes()
    return Result(*facts, "new") if same else None
