# SPDX-License-Identifier: Apache-2.0
"""The command line of the benchmarks: ``kdci bench``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import threads as pools

EPILOG = """\
examples:
  kdci bench dictionary --quick              a minute, to see that everything works
  kdci bench dictionary --threads 1 --save   the figures of the README
  kdci bench compensation --save             compensation and loss, five shapes
  kdci bench step --save                     KDCI's share of training steps
  kdci bench selection --save                memory of DFND's selection from a million images
  kdci bench study runs/study-mini           keep what a study found
  kdci bench readme                          the README's tables from the saved figures
"""


def main(words: Sequence[str]) -> None:
    """Run a benchmark.

    Args:
        words: Words after ``kdci bench``.

    Raises:
        ValueError: For an unknown shape or peer, and a README without markers.
        FileNotFoundError: If there are no saved figures.
    """
    parser = argparse.ArgumentParser(
        "kdci bench",
        description="Measure the operators beside what people use today.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    dictionary = commands.add_parser(
        "dictionary", help="the confounder dictionary", description="Measure the dictionary."
    )
    dictionary.add_argument("--shapes", nargs="+", metavar="NxDxK", help="by default all")
    dictionary.add_argument("--peers", nargs="+", metavar="NAME", help="by default all")
    dictionary.add_argument("--seconds", type=float, help="time for the rounds of a shape (4)")
    dictionary.add_argument("--rounds", type=int, help="rounds at least (3)")
    dictionary.add_argument("--seeds", type=int, help="seeds of small shapes (5)")
    dictionary.add_argument(
        "--peer-limit", type=float, help="seconds for one dictionary; slower peers are skipped (20)"
    )
    dictionary.add_argument(
        "--memory", choices=["large", "all", "none"], help="shapes whose memory is measured (large)"
    )
    dictionary.add_argument("--device", choices=["cpu", "cuda"], help="where to compute (cpu)")
    compensation = commands.add_parser(
        "compensation",
        help="compensation and loss, forward and backward",
        description="Measure compensation and loss.",
    )
    compensation.add_argument("--shapes", nargs="+", metavar="BxDxKxH", help="by default all")
    compensation.add_argument("--device", choices=["cpu", "cuda"], help="where to compute (cpu)")
    step = commands.add_parser(
        "step",
        help="KDCI's share of training steps",
        description="Measure training steps with and without KDCI.",
    )
    step.add_argument("--networks", nargs="+", metavar="NAME", help="by default all")
    step.add_argument("--methods", nargs="*", metavar="NAME", help="by default all")
    for timed in (compensation, step):
        timed.add_argument("--seconds", type=float, help="time for the rounds of a comparison (4)")
        timed.add_argument("--rounds", type=int, help="rounds at least (3)")
    selection = commands.add_parser(
        "selection",
        help="DFND's selection from a stream of logits",
        description="Measure memory and speed of DFND's selection.",
    )
    selection.add_argument("--files", type=int, help="images in the stream (1000000)")
    for command in (dictionary, compensation, step, selection):
        command.add_argument("--threads", type=int, default=1, help="threads of everyone (1)")
        command.add_argument("--quick", action="store_true", help="small shapes, a short time")
        command.add_argument(
            "--save",
            nargs="?",
            const="",
            metavar="NAME",
            help="write benchmarks/results/NAME.csv, a plot too where there is one "
            "(<benchmark>-<threads>-thread, or selection)",
        )
    study = commands.add_parser("study", help="copy a study's tables and plots to the results")
    study.add_argument("folder", type=Path, help="of the study, as kdci study leaves it")
    readme = commands.add_parser("readme", help="write the README's tables from saved figures")
    readme.add_argument("--check", action="store_true", help="only say whether they are those")
    arguments = parser.parse_args(words)
    if arguments.command in ("readme", "study"):
        {"readme": _readme, "study": _study}[arguments.command](arguments)
        return
    if arguments.threads < 1:
        parser.error(f"--threads {arguments.threads} must be >= 1")
    pools.set_environment(arguments.threads)
    run = {
        "dictionary": _dictionary,
        "compensation": _compensation,
        "step": _step,
        "selection": _selection,
    }
    run[arguments.command](arguments)


def _dictionary(arguments: argparse.Namespace) -> None:
    from benchmarks import dictionary, harness, report
    from benchmarks.peers import PEERS

    shapes: Sequence[dictionary.Shape] = dictionary.SHAPES
    options = dictionary.Options(threads=arguments.threads)
    if arguments.quick:
        shapes, options = shapes[:2], replace(options, seconds=1.0)
    if arguments.shapes:
        shapes = dictionary.find_shapes(arguments.shapes)
    given = {
        "seconds": arguments.seconds,
        "min_rounds": arguments.rounds,
        "seeds": arguments.seeds,
        "peer_limit": arguments.peer_limit,
        "memory": arguments.memory,
        "device": arguments.device,
    }
    options = replace(options, **{k: v for k, v in given.items() if v is not None})
    for name in ("seconds", "min_rounds", "seeds", "peer_limit"):
        if getattr(options, name) <= 0:
            raise ValueError(f"{name}={getattr(options, name)} must be > 0")
    names = [peer.name for peer in PEERS]
    wanted = arguments.peers or names
    for name in wanted:
        if name not in names:
            raise ValueError(f"unknown peer {name!r}: expected some of {', '.join(names)}")
    # Native is what the others are compared with. Those that run on GPUs alone are left out of a
    # run on the CPU; everyone else who cannot run is listed.
    peers = [
        peer
        for peer in PEERS
        if peer.name in (*wanted, "native") and options.device in peer.devices
    ]
    for peer in peers:
        peer.absent(options.device)  # loads it, so that its threads can be limited
    pools.limit(options.threads)
    timer = harness.make_timer(options.threads, options.device)
    peak, source = harness.fma_peak(options.threads, options.device)
    about = harness.header(
        options.threads,
        dictionary.packages(peers),
        device=_device_name(options.device),
        clock=_clock_name(options),
        peak=f"{peak:.4g} GFLOP/s by {source}",
        options=f"seconds {options.seconds:g}, rounds >= {options.min_rounds}, "
        f"seeds {options.seeds}, peer limit {options.peer_limit:g} s",
    )
    for key, value in about.items():
        print(f"{key}: {value}")
    rows: list[dictionary.Row] = []
    for shape in shapes:
        found = dictionary.bench_shape(shape, peers, options, timer, peak)
        dictionary.print_rows(found)
        rows += found
    if options.threads == 1 and options.device == "cpu":
        print("\nwanted, and found:")
        print("\n".join(dictionary.summarize(rows)))
    if arguments.save is not None:
        default = f"dictionary-{options.threads}-thread"
        default += "" if options.device == "cpu" else f"-{options.device}"
        path = harness.RESULTS / f"{arguments.save or default}.csv"
        harness.save(path, about, rows)
        print(f"\nwritten to {path.relative_to(harness.ROOT)}")
        try:
            plot = report.plot_dictionary(about, rows, path.with_suffix(".svg"))
            print(f"written to {plot.relative_to(harness.ROOT)}")
        except ModuleNotFoundError as error:
            print(f"no plot: {error}")


def _device_name(device: str) -> str:
    import torch

    return device if device == "cpu" else torch.cuda.get_device_name()


def _clock_name(options: object) -> str:
    threads, device = getattr(options, "threads", 1), getattr(options, "device", "cpu")
    return "CPU time of the process" if threads == 1 and device == "cpu" else "wall clock"


def _compensation(arguments: argparse.Namespace) -> None:
    from benchmarks import compensation, harness

    shapes: Sequence[compensation.Shape] = compensation.SHAPES
    if arguments.shapes:
        shapes = compensation.find_shapes(arguments.shapes)
    elif arguments.quick:
        shapes = compensation.QUICK
    device = arguments.device or "cpu"
    seconds, rounds = _time_of_rounds(arguments)
    pools.limit(arguments.threads)
    timer = harness.make_timer(arguments.threads, device)
    peak, source = harness.fma_peak(arguments.threads, device)
    about = harness.header(
        arguments.threads,
        [],
        device=_device_name(device),
        clock=_clock_name(argparse.Namespace(threads=arguments.threads, device=device)),
        peak=f"{peak:.4g} GFLOP/s by {source}",
        options=f"seconds {seconds:g}, rounds >= {rounds}",
    )
    for key, value in about.items():
        print(f"{key}: {value}")
    rows: list[compensation.Row] = []
    for shape in shapes:
        found = compensation.bench_shape(
            shape, timer, peak, seconds, min_rounds=rounds, device=device
        )
        compensation.print_rows(found)
        rows += found
    if arguments.threads == 1 and device == "cpu":
        print("\nwanted, and found:")
        print("\n".join(compensation.summarize(rows)))
    if arguments.save is not None:
        default = f"compensation-{arguments.threads}-thread"
        default += "" if device == "cpu" else f"-{device}"
        path = harness.RESULTS / f"{arguments.save or default}.csv"
        harness.save(path, about, rows)
        print(f"\nwritten to {path.relative_to(harness.ROOT)}")


def _time_of_rounds(arguments: argparse.Namespace) -> tuple[float, int]:
    """Return the time of a comparison and its rounds at least."""
    seconds, rounds = arguments.seconds, arguments.rounds
    if seconds is None:
        seconds = 0.5 if arguments.quick else 4.0
    if rounds is None:
        rounds = 3
    for name, value in (("seconds", seconds), ("rounds", rounds)):
        if value <= 0:
            raise ValueError(f"{name}={value} must be > 0")
    return seconds, rounds


def _step(arguments: argparse.Namespace) -> None:
    from benchmarks import harness, step

    networks, methods = step.NETWORKS, step.METHODS
    if arguments.quick:
        networks, methods = networks[:1], methods[:1]
    if arguments.networks:
        networks = step.find(arguments.networks, step.NETWORKS)
    if arguments.methods is not None:
        methods = step.find(arguments.methods, step.METHODS)
    seconds, rounds = _time_of_rounds(arguments)
    pools.limit(arguments.threads)
    timer = harness.make_timer(arguments.threads)
    about = harness.header(
        arguments.threads,
        [],
        clock=_clock_name(arguments),
        options=f"seconds {seconds:g}, rounds >= {rounds}",
    )
    for key, value in about.items():
        print(f"{key}: {value}")
    rows: list[step.Row] = []
    step.print_header()
    for network in networks:
        found = step.bench_network(network, timer, seconds, min_rounds=rounds)
        step.print_rows(found)
        rows += found
    for method in methods:
        found = step.bench_method(method, timer, seconds, min_rounds=rounds)
        step.print_rows(found)
        rows += found
    print("\nwanted, and found:")
    print("\n".join(step.summarize(rows)))
    if arguments.save is not None:
        path = harness.RESULTS / f"{arguments.save or f'step-{arguments.threads}-thread'}.csv"
        harness.save(path, about, rows)
        print(f"\nwritten to {path.relative_to(harness.ROOT)}")


def _selection(arguments: argparse.Namespace) -> None:
    from benchmarks import harness, selection

    files = arguments.files or (selection.QUICK_FILES if arguments.quick else selection.FILES)
    if files < 1:
        raise ValueError(f"files={files} must be >= 1")
    about = harness.header(arguments.threads, [], clock=_clock_name(arguments))
    for key, value in about.items():
        print(f"{key}: {value}")
    rows = []
    for classes, select in selection.SHAPES:
        row = selection.bench_shape(files, classes, select, arguments.threads)
        print(selection.describe(row))
        rows.append(row)
    if arguments.save is not None:
        path = harness.RESULTS / f"{arguments.save or 'selection'}.csv"
        harness.save(path, about, rows)
        print(f"written to {path.relative_to(harness.ROOT)}")


def _study(arguments: argparse.Namespace) -> None:
    from benchmarks import harness, study

    page = study.save_study(arguments.folder)
    print(f"written to {page.relative_to(harness.ROOT)}")


def _readme(arguments: argparse.Namespace) -> None:
    from benchmarks import harness, report

    path = harness.ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    expected = report.fill_readme(text)
    if text == expected:
        print("README.md shows the saved figures")
    elif arguments.check:
        raise ValueError("README.md does not show the saved figures: run `kdci bench readme`")
    else:
        path.write_text(expected, encoding="utf-8")
        print("README.md is written")
