"""Counts how many neighbours have a pixel's own label, over a folder of label images: what weighs
the dilated affinity loss and starts its head. Writes the statistics as JSON and draws them.

Command line: ``tritonaff-stats`` or ``python -m tritonaff.statistics_cli``. Needs the extra
``stats``: pillow, matplotlib, rich.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritonaff.functional import WEIGHTINGS, neighbor_counts
from tritonaff.rates import expand_rates
from tritonaff.statistics import NeighborStatistics
from tritonaff.version import __version__

Rates = tuple[tuple[int, int], ...]
Result = list[Any] | str
LABEL_MODES = ("L", "P")  # 8 bits, gray or with a palette


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status is 1 where an image had to be skipped."""
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except (BrokenExecutor, ImportError, OSError, ValueError) as error:
        print(f"tritonaff-stats: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tritonaff-stats: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tritonaff-stats",
        description=__doc__,
        usage="%(prog)s LABEL_DIR --rates R[,R2] [R[,R2] ...] [options]",
    )
    parser.add_argument(
        "labels",
        type=Path,
        metavar="LABEL_DIR",
        help="PNG files in it and below; 8-bit pixels, the value is the class",
    )
    parser.add_argument(
        "--rates",
        type=_rate,
        nargs="+",
        required=True,
        metavar="R[,R2]",
        help="at the resolution of the images; 12,24 stands for both orders",
    )
    parser.add_argument("--ignore-index", type=int, default=255, metavar="LABEL")
    for name, default in (("--json", "neighbors.json"), ("--plot", "neighbors.png")):
        parser.add_argument(
            name, type=Path, default=Path(default), metavar="FILE", help="default: %(default)s"
        )
    parser.add_argument(
        "--workers",
        type=_workers,
        default=min(8, _cpus()),
        metavar="N",
        help="processes that read (default: %(default)s); 1 starts none",
    )
    return parser


def _rate(text: str) -> int | tuple[int, int]:
    sizes = text.split(",")
    if len(sizes) > 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"expected R or R1,R2 of positive integers, got {text!r}")
    first, *second = map(int, sizes)
    return (first, second[0]) if second else first


def _workers(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def _cpus() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _run(args: argparse.Namespace) -> int:
    try:
        import PIL
        import rich  # noqa: F401

        from tritonaff.plotting import plot_neighbor_frequencies
    except ImportError as error:
        raise ImportError(
            "needs pillow, matplotlib and rich: pip install pillow matplotlib rich"
        ) from error
    rates = expand_rates(args.rates)
    paths = _label_paths(args.labels, leave_out=args.plot)
    for path in (args.json, args.plot):
        path.parent.mkdir(parents=True, exist_ok=True)

    statistics = NeighborStatistics(rates, args.ignore_index)
    skipped = []
    with _results(paths, rates, args.ignore_index, args.workers) as results:
        for path, result in zip(paths, _progress(results, len(paths)), strict=True):
            if isinstance(result, str):
                skipped.append(str(path.relative_to(args.labels)))
                print(f"tritonaff-stats: skipped {skipped[-1]}: {result}", file=sys.stderr)
            else:
                pixel_count, signal_count = map(torch.tensor, result)
                statistics.pixel_count += pixel_count
                statistics.signal_count += signal_count
    images = len(paths) - len(skipped)
    if not images:
        raise ValueError(f"no image in {args.labels} could be read")
    if not statistics.pixel_count.any():
        raise ValueError(f"no pixel counts: all are ignored, --ignore-index {args.ignore_index}")

    content = {
        "images": images,
        "skipped": skipped,
        **statistics.state_dict(),
        "frequencies": statistics.frequencies(),
        "positive_frequency": statistics.positive_frequency(),
        "weights": {weighting: statistics.weight(weighting) for weighting in WEIGHTINGS},
        "versions": {
            "tritonaff": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pillow": PIL.__version__,
        },
    }
    args.json.write_text(json.dumps(content, indent=1, default=Tensor.tolist) + "\n")
    plot_neighbor_frequencies(statistics, args.plot)
    _print(statistics, images)
    print(f"written: {args.json}, {args.plot}")
    return 1 if skipped else 0


def _label_paths(folder: Path, leave_out: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"no such folder: {folder}")
    plot = leave_out.resolve()  # of an earlier run, where it is kept beside the labels
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() == ".png" and path.is_file() and path.resolve() != plot
    )
    if not paths:
        raise ValueError(f"no PNG files in {folder}")
    return paths


@contextmanager
def _results(
    paths: list[Path], rates: Rates, ignore_index: int, workers: int
) -> Iterator[Iterator[Result]]:
    """What :func:`count_file` returns for each path, in their order."""
    workers = min(workers, len(paths))
    if workers == 1:
        yield (count_file(path, rates, ignore_index) for path in paths)
        return
    executor = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),  # a fork would copy torch's threads and locks
        initializer=_use_one_thread,
    )
    try:
        with _interrupts_held_back():  # workers inherit that: Ctrl-C is for this process alone
            futures = [executor.submit(count_file, path, rates, ignore_index) for path in paths]
        yield (future.result() for future in futures)
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C takes effect afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _use_one_thread() -> None:
    torch.set_num_threads(1)


def count_file(path: Path, rates: Rates, ignore_index: int) -> Result:
    """The counts (R, 9) of pixels and (R, 9, 2) of signals of an image; why not, if it is no label
    image. Not as tensors: sending one to another process costs a file descriptor.
    """
    try:
        target = read_label(path)
    except Exception as error:  # Pillow's decoders raise what they like
        return str(error) or type(error).__name__
    counts = neighbor_counts(target[None], rates, ignore_index=ignore_index)
    return [count.tolist() for count in counts]


def read_label(path: Path) -> Tensor:
    """(H, W) uint8; ValueError for an image that is not 8-bit gray or with a palette."""
    from PIL import Image

    with Image.open(path) as image:
        if image.format != "PNG":
            raise ValueError(f"expected a PNG file, got {image.format}")
        if image.mode not in LABEL_MODES:
            raise ValueError(f"expected 8-bit pixels of mode L or P, got mode {image.mode}")
        # Pillow stretches gray values of fewer bits to 8; indices into a palette it leaves alone.
        bits = path.read_bytes()[24]
        if image.mode == "L" and bits != 8:
            raise ValueError(f"expected 8-bit pixels, got {bits} bits")
        width, height = image.size
        pixels = bytearray(image.tobytes())
    return torch.frombuffer(pixels, dtype=torch.uint8).view(height, width)


def _progress(results: Iterator[Result], total: int) -> Iterable[Result]:
    """A bar on a terminal; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import track

    return track(
        results,
        "counting",
        total,
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def _print(statistics: NeighborStatistics, images: int) -> None:
    pixels = statistics.pixel_count.sum(dim=1).max()
    print(f"{images} image{'s' * (images != 1)}, {pixels:,} pixels")
    print("percent of n0 to n8, and of signals that are same:")
    print("rate     ", *(f"n{k}".rjust(6) for k in range(9)), "  same")
    rows = zip(
        statistics.rates, statistics.frequencies(), statistics.positive_frequency(), strict=True
    )
    for (down, across), frequencies, positive in rows:
        percents = (f"{100 * x:6.2f}" for x in (*frequencies, positive))
        print(f"{down},{across}".ljust(9), *percents)


if __name__ == "__main__":
    sys.exit(main())
