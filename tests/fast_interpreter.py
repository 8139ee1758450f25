"""Triton's interpreter, faster: the same operations on the same numbers.

Triton patches triton.language for every call of a helper, and makes a table of dtypes for every
look-up of a dtype. Either takes longer than the arithmetic. Patching once per launch and one table
are enough.
"""

import functools
import inspect


def speed_up_interpreter() -> None:
    """Changes nothing if the interpreter of this Triton is written differently."""
    from triton.runtime import interpreter

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
