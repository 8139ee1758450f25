"""Triton's interpreter, faster: the same operations on the same numbers.

Around each operation on numbers Triton does much that takes longer than the arithmetic, and that
is the same every time: it patches triton.language for every call of a helper, makes a table of
dtypes for every look-up of a dtype, makes the types and shapes of every block anew, and computes
integers a second time to find overflows, which it reports in debug mode alone.
"""

import functools
import inspect

# The internals of other versions are written differently: there these versions' own code runs.
VERSION_OF_TYPES = "3.9"


def speed_up_interpreter() -> None:
    import triton
    from triton.runtime import interpreter

    if triton.__version__.startswith(f"{VERSION_OF_TYPES}."):
        make_types_once()
        skip_unreported_overflows()
    has_classes = {"GridExecutor", "_LangPatchScope"} <= vars(interpreter).keys()
    if has_classes and parameters(interpreter, "_patch_lang") == ["fn"]:
        patch_once_per_launch(interpreter)
    if parameters(interpreter, "_get_np_dtype") == ["tt_dtype"]:
        look_up_dtypes_once(interpreter)


def parameters(module, name):
    function = getattr(module, name, None)
    return list(inspect.signature(function).parameters) if inspect.isfunction(function) else None


def patch_once_per_launch(interpreter):
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__

    @functools.wraps(launch)
    def launch_patched_once(self, *args, **kwargs):
        scopes = {}

        def patch_once(fn):
            module = id(fn.__globals__)  # whose functions see the same triton.language
            if module not in scopes:
                scopes[module] = patch(fn)
            return interpreter._LangPatchScope()  # nothing to restore: the launch does

        interpreter._patch_lang = patch_once
        try:
            return launch(self, *args, **kwargs)
        finally:
            interpreter._patch_lang = patch
            for scope in reversed(scopes.values()):
                scope.restore()

    interpreter.GridExecutor.__call__ = launch_patched_once


def look_up_dtypes_once(interpreter):
    look_up, known = interpreter._get_np_dtype, {}

    def known_dtype(tt_dtype):
        name = str(tt_dtype.scalar)
        if name not in known:
            known[name] = look_up(tt_dtype)
        return known[name]

    interpreter._get_np_dtype = known_dtype


def make_types_once():
    """Types, shapes and the constants in them are never changed, so that all blocks of a shape can
    share them.
    """
    from triton.language import core, semantic

    @functools.cache
    def shape_of(numbers):
        shape = core.tuple(numbers)
        return shape, core.validate_block_shape(shape), f"{shape}"

    make_block_type = core.block_type.__init__

    def init_block_type(self, element_ty, shape):
        numbers = tuple(shape.values if isinstance(shape, core.tuple) else shape)
        if not numbers or not all(type(number) is int for number in numbers):
            make_block_type(self, element_ty, shape)
            return
        self.element_ty = element_ty
        self.shape, self.numel, shape_name = shape_of(numbers)
        self.name = f"<{shape_name}, {element_ty}>"

    core.block_type.__init__ = init_block_type

    @functools.cache
    def constants_of(numbers):
        size = 1
        for number in numbers:
            size *= number
        return core.constexpr(size), core.tuple([core.constexpr(number) for number in numbers])

    def init_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = constants_of(tuple(type.shape.values) if type.is_block() else ())

    core.tensor.__init__ = init_tensor

    broadcast = semantic.TritonSemantic.broadcast_impl_value

    def broadcast_impl_value(self, lhs, rhs):
        both = lhs.type.is_block() and rhs.type.is_block()
        if both and lhs.type.shape is rhs.type.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    semantic.TritonSemantic.broadcast_impl_value = broadcast_impl_value


def skip_unreported_overflows():
    from triton.language.semantic import TritonSemantic

    check = TritonSemantic.binary_op_sanitize_overflow_impl

    def check_if_reported(self, *arguments):
        if self.builder.options.debug:
            check(self, *arguments)

    TritonSemantic.binary_op_sanitize_overflow_impl = check_if_reported
