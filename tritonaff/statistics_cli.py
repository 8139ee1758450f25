"""Counts how many neighbours have a pixel's own label, over a folder of label images. These counts
weigh the dilated affinity loss and start its head. Writes the statistics as JSON and draws them.

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

from tritonaff.api.neighbors import NeighborStatistics
from tritonaff.files import check_writable, read_label, replacing
from tritonaff.functional import WEIGHTINGS, neighbor_counts
from tritonaff.rates import expand_rates
from tritonaff.version import __version__

Rates = tuple[tuple[int, int], ...]
Result = list[Any] | str


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status is 1 if an image had to be skipped."""
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
    """Number of CPUs that this process may use."""
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
    _check_outputs(args.json, args.plot)

    statistics = NeighborStatistics(rates, args.ignore_index)
    skipped, sizes = [], set()
    with _results(paths, rates, args.ignore_index, args.workers) as results:
        for path, result in zip(paths, _progress(results, len(paths)), strict=True):
            if isinstance(result, str):
                skipped.append(str(path.relative_to(args.labels)))
                print(f"tritonaff-stats: skipped {skipped[-1]}: {result}", file=sys.stderr)
            else:
                size, pixel_count, signal_count = result
                sizes.add(size)
                statistics.pixel_count += torch.tensor(pixel_count)
                statistics.signal_count += torch.tensor(signal_count)
    images = len(paths) - len(skipped)
    if not images:
        raise ValueError(f"no image in {args.labels} could be read")
    _check_counts(statistics, sizes)

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
    with replacing(args.json) as new_json:
        new_json.write_text(json.dumps(content, indent=1, default=Tensor.tolist) + "\n")
        with replacing(args.plot) as new_plot:  # both are written, or neither
            plot_neighbor_frequencies(statistics, new_plot)
    _print(statistics, images)
    print(f"written: {args.json}, {args.plot}")
    return 1 if skipped else 0


def _label_paths(folder: Path, leave_out: Path) -> list[Path]:
    """Paths of the label images in a folder. Links are followed; a file or a folder that is reached
    twice is read once.
    """
    if not folder.is_dir():
        raise ValueError(f"no such folder: {folder}")
    paths: dict[str, Path] = {}
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        if os.path.realpath(root) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        folders.sort()  # or the order of the disk would decide which of two paths is kept
        for path in (Path(root, file) for file in sorted(files)):
            # A link that leads nowhere is kept: reading it reports the error.
            if path.suffix.lower() == ".png" and (path.is_file() or not path.exists()):
                paths.setdefault(os.path.realpath(path), path)
    # A picture that an earlier run has left beside the labels is no label image.
    paths.pop(os.path.realpath(leave_out), None)
    if not paths:
        raise ValueError(f"no PNG files in {folder}")
    return sorted(paths.values())


def _raise(error: OSError) -> None:
    raise error


def _check_outputs(json: Path, plot: Path) -> None:
    if os.path.realpath(json) == os.path.realpath(plot):
        raise ValueError(f"--json and --plot must be two files, got {json} for both")
    for path in (json, plot):
        if path.is_file() and not isinstance(count_file(path, ((1, 1),), 255), str):
            raise ValueError(f"{path} is a label image: choose another file to write")
        check_writable(path)


def _check_counts(statistics: NeighborStatistics, sizes: set[tuple[int, int]]) -> None:
    """ValueError if a rate has nothing to count: its frequencies would mean nothing."""
    too_far = [
        (down, across)
        for down, across in statistics.rates
        if all(height <= down and width <= across for height, width in sizes)
    ]
    if too_far:
        height, width = max(sizes, key=lambda size: sorted(size, reverse=True))
        raise ValueError(
            f"no pixel has a neighbour at rate {_names(too_far)}: "
            f"the largest image is {width} x {height}"
        )
    counts = zip(statistics.rates, statistics.pixel_count, strict=True)
    if ignored := [rate for rate, count in counts if not count.any()]:
        raise ValueError(
            f"no pixel counts at rate {_names(ignored)}: all are ignored, "
            f"or all their neighbours are, --ignore-index {statistics.ignore_index}"
        )


def _names(rates: list[tuple[int, int]]) -> str:
    return " or ".join(",".join(map(str, dict.fromkeys(rate))) for rate in rates)


@contextmanager
def _results(
    paths: list[Path], rates: Rates, ignore_index: int, workers: int
) -> Iterator[Iterator[Result]]:
    """The results of :func:`count_file` for the paths, in their order."""
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
        with _interrupts_held_back():  # workers inherit the mask: Ctrl-C is for this process alone
            futures = [executor.submit(count_file, path, rates, ignore_index) for path in paths]
        yield (future.result() for future in futures)
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Holds Ctrl-C back: it takes effect after the ``with`` block."""
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
    """The size of an image and its counts of pixels (R, 9) and signals (R, 9, 2); an error message
    if the file is no label image. The counts are lists: sending a tensor to another process costs
    a file descriptor.
    """
    try:
        target = read_label(path)
    except Exception as error:  # Pillow's decoders raise exceptions of any type
        return str(error) or type(error).__name__
    counts = neighbor_counts(target[None], rates, ignore_index=ignore_index)
    return [tuple(target.shape), *(count.tolist() for count in counts)]


def _progress(results: Iterator[Result], total: int) -> Iterable[Result]:
    """Shows a progress bar on a terminal, and nothing elsewhere."""
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
