"""Machine code by numba: what a function calls is typed and lowered piece by piece, then optimised as a whole, once.

numba by itself makes each function a library of its own, optimises it together with all that it calls, and makes
machine code of that, whether it is needed or not: for functions that call one another most of the work is done many
times over.

An index is never counted from the end: numba looks at each whether it is negative, in code that follows indices from
array to array a good part of all that is done.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any
from zlib import crc32

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core.ccallback import _CFuncCompiler  # type: ignore[attr-defined]
from numba.core.codegen import AOTCodeLibrary, AOTCPUCodegen
from numba.core.compiler import Compiler
from numba.core.compiler_lock import global_compiler_lock
from numba.core.cpu import CPUTargetOptions
from numba.core.descriptors import TargetDescriptor
from numba.core.dispatcher import Dispatcher
from numba.core.imputils import lower_getattr_generic
from numba.core.registry import cpu_target
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, intrinsic, models, register_model
from numba.np import arrayobj
from numba.np.numpy_support import from_dtype

from squall.native.bundle import Form, Items
from squall.native.linking import processor

# No reference counts, no ZeroDivisionErrors: then nothing of numba's own run-time is called.
_OPTIONS = {"nopython": True, "_nrt": False, "error_model": "numpy"}


@global_compiler_lock
def compiled(function: Callable[..., Any], bundles: tuple[Form, ...], arguments: int) -> bytes:
    """Object code of a C function of that name: of pointers to the bundles and 64-bit integers, to such an integer.

    Raises TypeError if it would need numba's run time.
    """
    kinds = (*map(_Bundled, bundles), *[types.int64] * arguments)
    with _remembering():
        made = _CFuncCompiler(function, _target, _OPTIONS, {}, Compiler).compile(kinds, types.int64)
    unit = llvm.parse_assembly("")
    unit.triple = llvm.get_process_triple()
    unit.data_layout = str(_target.machine.target_data)
    for module in _modules(made.library):
        unit.link_in(module, preserve=True)
    name = function.__name__
    unit.get_function(made.fndesc.llvm_cfunc_wrapper_name).name = name
    for one in (*unit.functions, *unit.global_variables):
        if not one.is_declaration and one.name != name:
            one.linkage = llvm.Linkage.internal
    builder = llvm.create_pass_builder(_target.machine, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(unit, builder)
    declared = [one.name for one in unit.functions if one.is_declaration]
    wanted = [one for one in declared if one.startswith(("numba_", "NRT_", "Py"))]
    if wanted:
        raise TypeError(f"{function.__module__}.{name} may raise or allocate: it calls {', '.join(wanted)}")
    return bytes(_target.machine.emit_object(unit))


@contextmanager
def _remembering() -> Iterator[None]:
    """numba works out what an operation gives whenever it meets it; here once for each kind of operands."""
    known: dict[Any, Any] = {}
    work_out = types.Function.get_call_type

    def get_call_type(self: Any, context: Any, args: Any, kws: Any) -> Any:
        asked = self, tuple(args), tuple(kws.items())
        if asked not in known:
            known[asked] = work_out(self, context, args, kws)
        return known[asked]

    types.Function.get_call_type = get_call_type
    try:
        yield
    finally:
        types.Function.get_call_type = work_out


class _Library(AOTCodeLibrary):  # type: ignore[misc]
    """The code of one function, as it was lowered. What it calls is not linked to it, and nothing is optimised."""

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self.codegen._data_layout

    def finalize(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return 0  # it cannot be called yet


def _modules(library: Any) -> Iterator[Any]:
    """The code of a library and of all that it calls, each once."""
    known, open_ = {id(library)}, [library]
    while open_:
        one = open_.pop()
        if isinstance(one, _Library):
            yield one._final_module
            for other in one._linking_libraries:
                if id(other) not in known:
                    known.add(id(other))
                    open_.append(other)
        else:  # what numba brings has all it calls in it
            yield one._get_module_for_linking()


class _Codegen(AOTCPUCodegen):  # type: ignore[misc]
    _library_class = _Library

    def set_env(self, env_name: str, env: Any) -> None:
        """Nothing looks into the environment of a function that knows no Python objects."""


class _Target(TargetDescriptor):  # type: ignore[misc]
    """The CPU, with libraries of ours."""

    options = CPUTargetOptions
    typing_context = cpu_target.typing_context

    @cached_property
    def target_context(self) -> Any:
        return cpu_target.target_context.subtarget(_internal_codegen=_Codegen("squall", processor()), aot_mode=True)

    @property
    def machine(self) -> Any:
        """LLVM's idea of what the code is for."""
        return self.target_context.codegen()._tm


_target = _Target("cpu")


@intrinsic
def _prefetch(_: Any, array: Any, index: Any) -> Any:
    def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start = context.make_array(array)(context, builder, arguments[0]).data
        at = builder.bitcast(builder.gep(start, [arguments[1]]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [at.type, number, number, number])
        ask = builder.module.declare_intrinsic("llvm.prefetch", [at.type], kind)
        builder.call(ask, [at, number(1), number(3), number(1)])  # to write, near, data
        return context.get_dummy_value()

    return types.void(array, index), make


def prefetch_type() -> Any:
    """Of native.prefetch."""
    return cpu_target.typing_context.resolve_value_type(_prefetch)


_from_both_ends = arrayobj.fix_integer_index


def _index(context: Any, builder: Any, kind: Any, index: Any, size: Any) -> Any:
    """In place of numba's function; what it compiles for others is as ever."""
    if not isinstance(context.codegen(), _Codegen):
        return _from_both_ends(context, builder, kind, index, size)
    if isinstance(index, ir.Constant) and kind.signed and index.constant < 0:
        raise TypeError(f"index {index.constant}: compiled functions count from the begin")
    return context.cast(builder, index, kind, types.intp if kind.signed else types.uintp)


arrayobj.fix_integer_index = _index


class Overloads(Dispatcher):
    """A function that compiled ones call, for the types with which they do."""

    targetdescr = _target

    def __init__(self, function: Callable[..., Any], inlined: bool) -> None:
        alone = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "forceinline": inlined}
        super().__init__(function, targetoptions=_OPTIONS | alone)

    def get_call_template(self, args: Any, kws: Any) -> Any:
        """Of numbers the type counts alone: each constant would be a function of its own, compiled for itself."""
        return super().get_call_template(
            tuple(map(types.unliteral, args)), {name: types.unliteral(kind) for name, kind in kws.items()}
        )


class _Bundled(types.Type):  # type: ignore[misc]
    """The type of a Bundle."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.members = {name: _kind(of) for name, of in form.members}
        # The name is part of the name of every function that takes one: with all members these were kilobytes.
        super().__init__(f"{form.name}_{crc32(repr(form).encode()):08x}")

    @property
    def key(self) -> Any:
        """What makes two of them equal."""
        return self.form

    def place(self, name: str) -> int:
        """Where in the table the words of the member begin."""
        words = 0
        for key, kind in self.members.items():
            if key == name:
                return words
            words += 0 if kind == types.none else 1 + (kind.ndim if isinstance(kind, types.Array) else 0)
        raise KeyError(name)


def _kind(form: Any) -> Any:
    if isinstance(form, Form):
        return _Bundled(form)
    if isinstance(form, Items):
        return types.Array(from_dtype(form.dtype), form.ndim, "C")
    return {int: types.int64, float: types.float64, None: types.none}[form]


@register_model(_Bundled)
class _Model(models.OpaqueModel):  # type: ignore[misc]
    """One pointer."""


@infer_getattr
class _Attributes(AttributeTemplate):  # type: ignore[misc]
    key = _Bundled

    def generic_resolve(self, kind: _Bundled, name: str) -> Any:
        return kind.members.get(name)


@lower_getattr_generic(_Bundled)
def _read(context: Any, builder: Any, kind: _Bundled, pointer: Any, name: str) -> Any:
    word = ir.IntType(64)
    table = builder.bitcast(pointer, word.as_pointer())
    place = kind.place(name)

    def load(offset: int) -> Any:
        value = builder.load(builder.gep(table, [ir.Constant(word, place + offset)]))
        value.set_metadata("invariant.load", builder.module.add_metadata([]))
        return value

    member = kind.members[name]
    if member == types.none:
        return context.get_dummy_value()
    if isinstance(member, _Bundled):
        return builder.inttoptr(load(0), pointer.type)
    if isinstance(member, types.Array):
        shape = [load(1 + axis) for axis in range(member.ndim)]
        item = context.get_data_type(member.dtype)
        size = ir.Constant(word, context.get_abi_sizeof(item))
        strides = [size]
        for length in reversed(shape[1:]):
            strides.insert(0, builder.mul(strides[0], length))
        array = context.make_array(member)(context, builder)
        arrayobj.populate_array(
            array,
            data=builder.inttoptr(load(0), item.as_pointer()),
            shape=shape,
            strides=strides,
            itemsize=size,
            meminfo=None,
        )
        return array._getvalue()
    return builder.bitcast(load(0), ir.DoubleType()) if member == types.float64 else load(0)
