"""Counts classes, and how many neighbours have a pixel's own label, over a folder of label images.
The counts of classes give ``weight`` of cross-entropy; the counts of neighbours weigh the dilated
affinity loss and start its head. Writes the statistics as JSON and draws them.

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
from typing import Any, NamedTuple

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


DESCRIPTION = """\
Counts, over a folder of label images, the pixels of each class and how many
neighbours of each pixel have its label. Writes a JSON file and a picture."""
COLUMNS = """\
the table of classes:
  pixels, percent  pixels with this label, and their part of all that count
  images           images that have it
  inverse          class weight by inverse frequency: all pixels / (classes *
                   the class's pixels); 1 for each of equally frequent classes
  median           class weight by median frequency: the median class's
                   frequency over the class's, in the images that have it
  Pass a column as `weight` to a loss with cross-entropy. A class that never
  occurs has the weight 0.

the table of neighbours, a row for each rate:
  n0 ... n8        percent of the pixels of which 0 ... 8 neighbours have the
                   same label (n8: inside a segment)
  same             percent of all pairs of neighbours with the same label
tritonaff.NeighborStatistics.load_state_dict takes the content of the JSON
file, for the `statistics` of DilatedAffinityLoss."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tritonaff-stats",
        description=DESCRIPTION,
        epilog=COLUMNS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s LABEL_DIR --rates R[,R2] [R[,R2] ...] [options]",
    )
    parser.add_argument("--version", action="version", version=f"tritonaff {__version__}")
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
    parser.add_argument(
        "--ignore-index",
        type=int,
        default=255,
        metavar="LABEL",
        help="label of the pixels to leave out (default: %(default)s)",
    )
    for name, default in (("--json", "neighbors.json"), ("--plot", "neighbors.png")):
        parser.add_argument(
            name, type=Path, default=Path(default), metavar="FILE", help="default: %(default)s"
        )
    parser.add_argument("--force", action="store_true", help="replace files that are there")
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
    _check_outputs(args.json, args.plot, args.force)

    statistics = NeighborStatistics(rates, args.ignore_index)
    classes = ClassCounts(args.ignore_index)
    skipped, sizes = [], set()
    with _results(paths, rates, args.ignore_index, args.workers) as results:
        for path, result in zip(paths, _progress(results, len(paths)), strict=True):
            if isinstance(result, str):
                skipped.append(str(path.relative_to(args.labels)))
                print(f"tritonaff-stats: skipped {skipped[-1]}: {result}", file=sys.stderr)
            else:
                size, labels, pixel_count, signal_count = result
                sizes.add(size)
                classes.add(torch.tensor(labels))
                statistics.pixel_count += torch.tensor(pixel_count)
                statistics.signal_count += torch.tensor(signal_count)
    images = len(paths) - len(skipped)
    if not images:
        raise ValueError(f"no image in {args.labels} could be read")
    _check_counts(statistics, sizes)
    table = classes.table()

    content = {
        "images": images,
        "skipped": skipped,
        "classes": {"pixels": table.pixels, "images": table.images},
        "class_weights": {
            "inverse_frequency": table.inverse_frequency,
            "median_frequency": table.median_frequency,
        },
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
    print(f"{images} image{'s' * (images != 1)}, {table.pixels.sum():,} pixels", end="; ")
    _print_labels(classes)
    _print_classes(table)
    _print(statistics)
    print(f"written: {args.json}, {args.plot}")
    return 1 if skipped else 0


class ClassTable(NamedTuple):
    """Counts of classes and weights from them, each (C,); 0 for a class without pixels."""

    pixels: Tensor
    images: Tensor
    inverse_frequency: Tensor
    median_frequency: Tensor


class ClassCounts:
    """Counts by label, each (256,): pixels, images, and pixels that count in these images."""

    def __init__(self, ignore_index: int) -> None:
        self.ignore_index = ignore_index
        self.pixels, self.images, self.in_images = torch.zeros(3, 256, dtype=torch.int64)
        self.ignored = 0

    def add(self, pixels: Tensor) -> None:
        """Adds an image with this many pixels of each label, (256,)."""
        if 0 <= self.ignore_index < 256:
            self.ignored += int(pixels[self.ignore_index])
            pixels[self.ignore_index] = 0
        self.pixels += pixels
        self.images += pixels > 0
        self.in_images += (pixels > 0) * pixels.sum()

    def table(self) -> ClassTable:
        occurs = self.pixels > 0
        count = int(occurs.nonzero().max()) + 1
        inverse = self.pixels.sum() / (occurs.sum() * self.pixels)
        frequency = self.pixels / self.in_images
        median = frequency[occurs].quantile(0.5) / frequency
        weights = (torch.where(occurs, weight, 0)[:count] for weight in (inverse, median))
        return ClassTable(self.pixels[:count], self.images[:count], *weights)


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


def _check_outputs(json: Path, plot: Path, replace: bool) -> None:
    if os.path.realpath(json) == os.path.realpath(plot):
        raise ValueError(f"--json and --plot must be two files, got {json} for both")
    for name, path in (("json", json), ("plot", plot)):
        if path.is_file() and not isinstance(count_file(path, ((1, 1),), 255), str):
            raise ValueError(f"{path} is a label image: choose another file to write")
        if path.is_file() and not replace:
            raise ValueError(f"{path} exists: --force replaces it, --{name} names another file")
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
    """The size of an image, its pixels by label (256,), and its counts of pixels (R, 9) and signals
    (R, 9, 2); an error message if the file is no label image. The counts are lists: sending a
    tensor to another process costs a file descriptor.
    """
    try:
        target = read_label(path)
    except Exception as error:  # Pillow's decoders raise exceptions of any type
        return str(error) or type(error).__name__
    labels = torch.bincount(target.flatten(), minlength=256)
    counts = neighbor_counts(target[None], rates, ignore_index=ignore_index)
    return [tuple(target.shape), labels.tolist(), *(count.tolist() for count in counts)]


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


def _print_labels(classes: ClassCounts) -> None:
    """Names the labels, and warns if none is ignored: another label may stand for void."""
    labels, ignored = _ranges(classes.pixels.nonzero().flatten().tolist()), classes.ignore_index
    if classes.ignored:
        print(f"labels {labels}; {ignored} is ignored, {classes.ignored:,} pixels")
        return
    print(f"labels {labels}; none is ignored")
    print(
        f"tritonaff-stats: warning: no pixel has the label {ignored}, which is to be ignored; if "
        "another label stands for void, pass it as --ignore-index",
        file=sys.stderr,
    )


def _print_classes(table: ClassTable) -> None:
    print("class            pixels  percent   images    inverse     median")
    rows = zip(*(column.tolist() for column in table), strict=True)
    for label, (pixels, images, *weights) in enumerate(rows):
        if pixels:
            percent = 100 * pixels / int(table.pixels.sum())
            cells = "".join(f"{weight:11.4g}" for weight in weights)
            print(f"{label:5}{pixels:18,}{percent:9.2f}{images:9,}{cells}")


def _ranges(labels: list[int]) -> str:
    """ "0 to 4, 7" for the labels 0, 1, 2, 3, 4, 7."""
    ends: list[list[int]] = []
    for label in labels:
        if ends and label == ends[-1][1] + 1:
            ends[-1][1] = label
        else:
            ends.append([label, label])
    return ", ".join(f"{a} to {b}" if a < b else str(a) for a, b in ends)


def _print(statistics: NeighborStatistics) -> None:
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
