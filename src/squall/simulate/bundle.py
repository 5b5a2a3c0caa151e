"""A named tuple of arrays that compiled functions pass as one pointer.

numba passes a tuple member by member, an array as seven words and more: two kilobytes for the arrays of a cluster, at
every call. Here they stay in a table of words (address and shape of each array, or the number itself) to which one
pointer leads; a member is read where it is used. Compiled code sees the attributes of the tuple and cannot set them.
"""

from typing import Any
from zlib import crc32

import numpy as np
from llvmlite import ir
from numba import typeof, types
from numba.core.imputils import lower_getattr_generic
from numba.core.typing.templates import AttributeTemplate
from numba.extending import NativeValue, infer_getattr, models, register_model, typeof_impl, unbox
from numba.np.arrayobj import populate_array


class BundleType(types.Type):  # type: ignore[misc]
    """The type of a Bundle: the names and types of its members, in their order."""

    def __init__(self, name: str, members: tuple[tuple[str, Any], ...]) -> None:
        self.members = members
        of = ", ".join(f"{key}: {kind}" for key, kind in members)
        # The name is part of the name of every function that takes one: with all members these were kilobytes.
        super().__init__(f"{name}_{crc32(of.encode()):08x}")

    @property
    def key(self) -> Any:
        """What makes two of them equal."""
        return self.name, self.members

    def place(self, name: str) -> int:
        """Where in the table the words of the member begin."""
        words = 0
        for key, kind in self.members:
            if key == name:
                return words
            words += 1 + (kind.ndim if isinstance(kind, types.Array) else 0)
        raise KeyError(name)


_KINDS: dict[Any, Any] = {}


def _kind_of(array: np.ndarray) -> Any:
    """numba's type of the array: that of records is slow to make."""
    key = array.dtype, array.ndim, array.flags.c_contiguous, array.flags.aligned, array.flags.writeable
    if key not in _KINDS:
        _KINDS[key] = typeof(array)
    return _KINDS[key]


class Bundle:
    """The arrays (C-contiguous), integers, floats and inner tuples of a named tuple, for compiled functions."""

    def __init__(self, members: Any) -> None:
        """Keeps `members` alive; what is later written into its arrays is seen, other arrays in their stead are not."""
        words: list[int] = []
        kinds: list[tuple[str, Any]] = []
        self._kept: list[Any] = []
        for name, value in members._asdict().items():
            kept: Any = Bundle(value) if isinstance(value, tuple) else value
            kind: Any = types.int64
            self._kept.append(kept)
            if isinstance(kept, Bundle):
                kind = kept.kind
                words.append(kept.address)
            elif isinstance(kept, np.ndarray):
                kind = _kind_of(kept)
                if kind.layout != "C":
                    raise TypeError(f"{name}: a bundle holds C-contiguous arrays")
                words += [kept.ctypes.data, *kept.shape]
            elif isinstance(kept, float):
                kind = types.float64
                words.append(int(np.float64(kept).view(np.int64)))
            else:
                words.append(int(kept))
            kinds.append((name, kind))
        self._table = np.array(words, np.int64)
        self.kind: Any = BundleType(type(members).__name__, tuple(kinds))
        self.address: int = int(self._table.ctypes.data)


def bundled(members: Any) -> Any:
    """A Bundle of the named tuple; None stays None."""
    return None if members is None else Bundle(members)


@typeof_impl.register(Bundle)
def _type_of(value: Bundle, _: Any) -> BundleType:
    return value.kind


@register_model(BundleType)
class _Model(models.OpaqueModel):  # type: ignore[misc]
    """One pointer."""


@unbox(BundleType)
def _unbox(kind: BundleType, value: Any, c: Any) -> NativeValue:
    address = c.pyapi.object_getattr_string(value, "address")
    pointer = c.pyapi.long_as_voidptr(address)
    c.pyapi.decref(address)
    return NativeValue(pointer)


@infer_getattr
class _Attributes(AttributeTemplate):  # type: ignore[misc]
    key = BundleType

    def generic_resolve(self, kind: BundleType, name: str) -> Any:
        return dict(kind.members).get(name)


@lower_getattr_generic(BundleType)
def _read(context: Any, builder: Any, kind: BundleType, pointer: Any, name: str) -> Any:
    word = ir.IntType(64)
    table = builder.bitcast(pointer, word.as_pointer())
    place = kind.place(name)

    def load(offset: int) -> Any:
        value = builder.load(builder.gep(table, [ir.Constant(word, place + offset)]))
        value.set_metadata("invariant.load", builder.module.add_metadata([]))
        return value

    member = dict(kind.members)[name]
    if isinstance(member, BundleType):
        return builder.inttoptr(load(0), pointer.type)
    if isinstance(member, types.Array):
        shape = [load(1 + axis) for axis in range(member.ndim)]
        item = context.get_data_type(member.dtype)
        size = ir.Constant(word, context.get_abi_sizeof(item))
        strides = [size]
        for length in reversed(shape[1:]):
            strides.insert(0, builder.mul(strides[0], length))
        array = context.make_array(member)(context, builder)
        populate_array(
            array,
            data=builder.inttoptr(load(0), item.as_pointer()),
            shape=shape,
            strides=strides,
            itemsize=size,
            meminfo=None,
        )
        return array._getvalue()
    return builder.bitcast(load(0), ir.DoubleType()) if member == types.float64 else load(0)
