"""``python -m tritonaff.native``: compiles all native kernels, and says what is where."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from tritonaff.native import library


def main() -> int:
    compiler = library.find_compiler()
    print(f"compiler  {' '.join(compiler) if compiler else 'none found'}")
    print(f"flags     {' '.join(library.FLAGS)} -march={library.architecture()}")
    print(f"folder    {library.cache_folder()}")
    with ThreadPoolExecutor() as executor:
        lines = list(executor.map(_compile, library.OPERATIONS))
    print("\n".join(lines))
    return int(any("failed" in line for line in lines))


def _compile(operation: str) -> str:
    try:
        path, seconds = library.compile_library(operation)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{operation}: failed, {error}"
    return f"{operation}: {f'compiled in {seconds:.1f} s' if seconds else 'compiled before'}, {path.name}"


if __name__ == "__main__":
    sys.exit(main())
