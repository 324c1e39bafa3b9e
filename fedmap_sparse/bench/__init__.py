"""Benchmarks of every op beside its peers and the memory's floor: `fedmap-sparse bench`.

What fails its check is not timed. Ours and the peers take turns within one process, over inputs
that rotate beyond the cache, with outputs allocated beforehand on both sides.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from fedmap_sparse.bench import compare

__all__ = ["add_arguments", "main", "run"]


#: Without --ops a quick run leaves larger models out: to build them takes seconds.
QUICK_MODEL = 1_000_000
#: What other processes may use of the machine's CPUs before the figures are called disturbed.
QUIET_CPUS = 0.1


def _strings(text: str) -> list[str]:
    return [part for part in (piece.strip() for piece in text.split(",")) if part]


def _sizes(text: str) -> list[int]:
    found = [int(part) for part in _strings(text)]
    if not all(n > 0 for n in found):
        raise argparse.ArgumentTypeError(f"expected sizes above 0, got {text}")
    return found


def _densities(text: str) -> list[float]:
    found = [float(part) for part in _strings(text)]
    if not all(0 < d <= 1 for d in found):
        raise argparse.ArgumentTypeError(f"expected densities above 0, at most 1, got {text}")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fedmap-sparse bench`, and its form `compare`."""
    parser.set_defaults(do=run)
    parser.add_argument("--ops", type=_strings, help="names of ops or groups; default: all of them")
    parser.add_argument("--sizes", type=_sizes, help="elements; default 26214400, or as trained")
    parser.add_argument("--densities", type=_densities, help="default: each op's own")
    parser.add_argument("--dtypes", type=_strings, default=["float32"], help="default float32")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--inputs", default="normal", help="normal, uniform, ties, sorted or trained:PACKAGE"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write header and records there")
    parser.add_argument(
        "--round", action="store_true", help="whole rounds of federated models instead of ops"
    )
    parser.add_argument(
        "--growth", action="store_true", help="time against n, density and threads, with exponents"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="draw a page of the run there")
    parser.add_argument("--models", type=_strings, help="with --round; default: all of them")
    parser.add_argument("--quick", action="store_true", help="a check of the machinery in seconds")
    forms = parser.add_subparsers(dest="form", metavar="[compare]")
    compare.add_arguments(
        forms.add_parser("compare", help="what moved between two files of --json")
    )


def run(args: argparse.Namespace) -> int:
    """Exit code: 0; 1 if a case failed its check; 2 for a wrong option or what is missing here."""
    from fedmap_sparse.bench import page, report, runner
    from fedmap_sparse.page import require

    try:
        options = _options(args)
        results = _results(args, options)
        header = runner.header(options, _words(args))
        if args.html is not None:  # before minutes of measuring
            require("--html")
            if not args.html.parent.is_dir() or args.html.is_dir():
                raise ValueError(f"html: expected a file in a folder that exists, got {args.html}")
        console = report.console()
    except (ValueError, RuntimeError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    console.print(report.header_line(header), highlight=False)
    load = runner.OtherLoad()
    records: list[runner.Record] = []
    refused: list[dict[str, Any]] = []
    found = {"header": header, "records": records, "refused": refused}
    try:
        with console.status("") as status:
            for result in results:
                if isinstance(result, str):
                    header.setdefault("skipped", []).append(result)
                    console.print(result, highlight=False)
                elif isinstance(result, runner.Refused):
                    refused.append(result.as_dict())
                    console.print(report.refusal(result), style="red", highlight=False)
                else:
                    records.append(result)
                    status.update(f"{result['op']} {report.seconds(result['median_s'])}")
                header["others_cpus"] = load.cpus()
                if args.json is not None:  # after each, as a run takes minutes
                    args.json.write_text(json.dumps(found, indent=1) + "\n")
    finally:
        console.print(report.round_table(records) if args.round else report.table(records))
        if args.growth:
            console.print(report.growth_table(records, header["last_level_cache"]))
        if args.html is not None:
            page.write(args.html, [compare.checked(args.json or args.html, found)])
    if (cpus := load.cpus()) > QUIET_CPUS:
        console.print(f"Others kept {cpus:.1f} CPUs busy meanwhile: repeat on a quiet machine.")
    return 1 if refused else 0


def _options(args: argparse.Namespace):  # type: ignore[no-untyped-def]  # see runner.Options
    import torch

    from fedmap_sparse import _backends, _checks
    from fedmap_sparse.bench import inputs, runner, timing

    inputs.check_name(args.inputs)
    cases = runner.registry()
    known = {one.op: [one] for one in cases.values()}
    for one in cases.values():
        if one.group != one.op:
            known.setdefault(one.group, []).append(one)
    for name in args.ops or ():
        if name not in known:
            raise ValueError(f"ops: expected any of {', '.join(known)}, got {name!r}")
    dtypes = {_checks.short(d): d for d in _checks.FLOAT_DTYPES}
    for name in args.dtypes:
        if name not in dtypes:
            raise ValueError(f"dtypes: expected any of {', '.join(dtypes)}, got {name!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device: expected a CUDA device, but torch finds none on this machine")
    if args.device == "cpu" and (reason := _backends._missing("cpu")):
        raise RuntimeError(f"device: {reason}")
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"threads: expected at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    chosen = [one for name in args.ops or cases for one in known[name]]
    if args.quick and not args.ops:
        chosen = [one for one in chosen if (one.fixed_n or 0) < QUICK_MODEL]
    return runner.Options(
        cases=list(dict.fromkeys(chosen)),
        sizes=args.sizes or runner.default_sizes(args.inputs, args.quick),
        densities=args.densities,
        dtypes=[dtypes[name] for name in args.dtypes],
        device=torch.device(args.device),
        inputs=args.inputs,
        plan=timing.QUICK if args.quick else timing.Plan(),
        most_sets=2 if args.quick else runner.MOST_SETS,
    )


def _results(args: argparse.Namespace, options: Any) -> Iterator[Any]:
    """Records, refusals, and lines about what was skipped."""
    import torch

    from fedmap_sparse.bench import growth, runner

    if args.growth and args.round:
        raise ValueError("--growth and --round: expected one of them")
    if args.round:
        return _rounds(args)
    if not args.growth:
        return chain(runner.absent(options), runner.run(options))
    if options.device.type != "cpu":
        raise ValueError(f"device: with --growth expected cpu, got {options.device.type}")
    wanted = growth.points(
        torch.get_num_threads(),
        ops=args.ops or growth.OPS,
        sizes=args.sizes,
        densities=args.densities or growth.DENSITIES,
        quick=args.quick,
    )
    return growth.run(wanted, args.inputs, args.quick)


def _rounds(args: argparse.Namespace) -> Iterator[Any]:
    from fedmap_sparse.bench import models, rounds

    names = args.models or [n for n, (_, n_weights) in models.MODELS.items()
                            if not args.quick or n_weights < QUICK_MODEL]  # fmt: skip
    for name in names:
        if name not in models.MODELS:
            raise ValueError(f"models: expected any of {', '.join(models.MODELS)}, got {name!r}")
    densities = args.densities or ([0.1] if args.quick else [0.5, 0.1, 0.01])
    return rounds.run(names, densities, rounds.Size(), 2 if args.quick else 7)


def _words(args: argparse.Namespace) -> list[str]:
    given = {
        k: v for k, v in vars(args).items() if v not in (None, False) and k not in ("json", "html")
    }
    return [f"{k}={v}" for k, v in given.items() if isinstance(v, str | int | list | bool)]


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m fedmap_sparse.bench`: the same as `fedmap-sparse bench`."""
    parser = argparse.ArgumentParser(prog="fedmap-sparse bench", description=__doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    return int(args.do(args))
