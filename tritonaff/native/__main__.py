"""``python -m tritonaff.native``: compiles all native kernels, and says what is where."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from tritonaff.native import library


def main() -> int:
    compiler = library.find_compiler()
    print(f"compiler  {' '.join(compiler) if compiler else 'none found'}")
    print(f"flags     {' '.join(library.flags())}")
    print(f"folder    {library.cache_folder()}")
    with ThreadPoolExecutor() as executor:
        results = list(executor.map(_compile, library.OPERATIONS))
    print("\n".join(line for line, _ in results))
    return int(not all(done for _, done in results))


def _compile(operation: str) -> tuple[str, bool]:
    """A line that says what became of the operation, and False if there is no library."""
    try:
        path, seconds = library.compile_library(operation)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{operation}: failed, {error}", False
    when = f"compiled in {seconds:.1f} s" if seconds else "compiled before"
    return f"{operation}: {when}, {path.name}", True


if __name__ == "__main__":
    sys.exit(main())
