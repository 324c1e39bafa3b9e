"""`fedmap-sparse run | sweep | compare | report | bench | inspect | info`."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fedmap_sparse import __version__, _command
from fedmap_sparse._text import OutputClosed, printable, put, say
from fedmap_sparse.errors import ConfigError, DataError, FormatError, RoundFailed, WorkerDied

if TYPE_CHECKING:
    from fedmap_sparse.experiments.folder import RunFolder

PROG = "fedmap-sparse"

_RUN = """\
Runs FedMap and, beside it, dense FedAvg: every message encoded, sent as bytes, decoded.

Options are key=value words, on top of those of CONFIG.toml (`key = value` lines) if there is one.
With seeds=0,1,2 it runs once for each seed, in sub-folders, and compares the arms over the seeds.
Rounds are counted from 0. A key is shown with its default; <...> where that depends on others.
"""

_FILES = """\
files in the output folder:
  config.toml             the options; `fedmap-sparse run` takes it as CONFIG.toml
  metrics.jsonl           one line for each arm and round: accuracy, loss, density, bytes, seconds
  summary.json            accuracy and loss on test, bytes and seconds of each arm
  curves.png              accuracy, density and bytes over rounds
  checkpoint.safetensors  what --resume goes on from; checkpoint.previous.safetensors is the one
                          before it
  broadcast.fedmap        the last broadcast; `fedmap-sparse inspect` shows it
  model.safetensors       the final global model, dense, zeros where pruned
  model-dense.safetensors the final model of the dense arm

exit codes: 0 done; 1 a round failed, --resume draws it again; 2 an option, a file or an extra is
wrong or missing, or the folder is in use; 3 the disk, the memory or standard output gave out,
--resume goes on; 130 interrupted, --resume goes on
"""


class _Fault(Exception):
    """One line for stderr, and an exit code."""

    def __init__(self, text: str, code: int = 2) -> None:
        super().__init__(text)
        self.code = code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{printable(f'{self.prog}: {message}')}\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse drops what it cannot write, and the exit code would say that all is well.
        if file is sys.stdout:
            _check_open()
            put(message)
        else:
            super()._print_message(message, file)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, and raises nothing but argparse's SystemExit."""
    for stream in (sys.stdout, sys.stderr):
        if (
            isinstance(stream, io.TextIOWrapper) and stream.errors == "strict"
        ):  # an ASCII locale has no accents, no ×
            stream.reconfigure(errors="backslashreplace")
    command, going_on = PROG, _command.again(argv)
    try:
        try:
            args = _parsed(argv)
            command = f"{PROG} {args.command}"
            if args.command != "run":
                _command.watch_run()
                _check_open()
            code = int(args.do(args))
        finally:
            _flush()
        return code
    except _Fault as fault:
        text, code = str(fault), fault.code
    except OutputClosed as error:
        _silence()
        text, code = f"standard output cannot be written: {error}", 3
    except KeyboardInterrupt:
        text, code = f"interrupted; start again with: {going_on}", 130
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            _silence()
        text, code = _said(error), 3
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        text, code = f"out of memory: {str(error) or 'no more to be had'}", 3
    finally:
        _command.watch_nothing()
    _complain(f"{command}: {text}")
    return code


def _said(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def _is_memory(error: Exception) -> bool:
    import torch

    kinds = MemoryError | torch.OutOfMemoryError
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _check_open() -> None:
    if "stdout" in _command.closed:
        raise OutputClosed("it was closed")


def _flush() -> None:
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        raise OutputClosed(str(getattr(error, "strerror", None) or error)) from error


def _silence() -> None:
    """Drop what standard output still buffers: Python would complain when it exits."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _complain(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # there is nowhere else to say it
        print(printable(" ".join(text.split("\n"))), file=sys.stderr, flush=True)


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser, commands = _parser()
    args, rest = parser.parse_known_args(argv)
    args.argv = argv
    if args.command in ("run", "sweep"):
        # argparse takes no positional word after an option, so those come back here.
        args.words += [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        commands[args.command].error(f"unknown option {rest[0]}; --help lists them all")
    return args


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(prog=PROG, description="Federated training of sparse models with FedMap.")
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run", help="an experiment", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    run.usage = f"{PROG} run [CONFIG.toml] [key=value ...] [--out DIR] [--data DIR] [...]"
    run.description = _RUN
    run.format_help = lambda: _run_help(run)  # type: ignore[method-assign]  # argparse has no hook
    run.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    run.add_argument("--out", metavar="DIR", help="same as out=DIR")
    run.add_argument("--data", metavar="DIR", help="same as data=DIR")
    run.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    run.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    run.add_argument(
        "--show-partition", action="store_true", help="print each client's classes, and end"
    )
    run.set_defaults(do=_run)

    sweep = commands.add_parser("sweep", help="a grid of experiments, in parallel processes")
    sweep.usage = f"{PROG} sweep SWEEP.toml [key=value ...] [--out DIR] [--data DIR] [--jobs N]"
    sweep.add_argument("file", type=Path, metavar="SWEEP.toml", help="options, seeds, [grid]")
    sweep.add_argument("words", nargs="*", help="key=value, over the options of the file")
    sweep.add_argument("--out", metavar="DIR", help="folder of the runs; default: runs/NAME")
    sweep.add_argument("--data", metavar="DIR", help="same as data=DIR")
    sweep.add_argument("--jobs", type=int, metavar="N", help="runs at a time; default: the cores")
    sweep.add_argument("--overwrite", action="store_true", help="run finished ones again, too")
    sweep.set_defaults(do=_sweep)
    compare = commands.add_parser("compare", help="runs side by side, paired over seeds")
    compare.add_argument("paths", type=Path, nargs="+", metavar="FOLDER", help="of runs")
    compare.add_argument("--json", type=Path, metavar="FILE", help="the comparison as JSON")
    compare.set_defaults(do=_compare)
    report = commands.add_parser("report", help="a page of the runs in a folder")
    report.add_argument("folder", type=Path, metavar="FOLDER", help="of runs, at any depth")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: FOLDER/report.html")
    report.set_defaults(do=_report)

    bench = commands.add_parser("bench", help="every kernel beside its peers and its floor")
    inspect = commands.add_parser("inspect", help="what a message file holds")
    inspect.add_argument("file", type=Path, metavar="FILE", help="a message, as run saves one")
    inspect.set_defaults(do=_inspect)
    info = commands.add_parser("info", help="versions, backends, ISA, threads, GPU")
    info.set_defaults(do=_info)
    _add_bench(bench)
    return parser, commands.choices


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from fedmap_sparse import bench

    bench.add_arguments(parser)


def _run_help(parser: argparse.ArgumentParser) -> str:
    # Read here, so that `info` and `inspect` need none of what experiments import.
    from fedmap_sparse.experiments.config import Config
    from fedmap_sparse.experiments.options import help_text

    parser.epilog = f"{help_text(Config)}\n\n{_FILES}"
    return argparse.ArgumentParser.format_help(parser)


def _run(args: argparse.Namespace) -> int:
    from fedmap_sparse.experiments import commands, config, lean, progress, runner
    from fedmap_sparse.experiments.folder import RunFolder

    _need_safetensors()
    watch = progress.observer()
    _command.watch_run()
    if "stdout" in _command.closed:
        _complain(f"{PROG} run: standard output is closed; results go to the run's folder alone")
    folder: RunFolder | None = None

    def going_on() -> str:
        if folder is None or not watch.begun or not folder.config.exists():
            return _command.again(args.argv)
        return shlex.join([PROG, "run", "--resume", "--out", str(folder.path)])

    try:
        given = commands.given(args.words, out=args.out, data=args.data)
        if "seeds" in given:
            return _seeds(args, given)
        folder = RunFolder(config.folder_of(given))
        if args.resume and not args.overwrite:
            given = commands.resumed(folder, given)
        chosen = config.build(given)
        if args.show_partition:
            commands.show_partition(chosen)
        else:
            lean.keep_memory()
            runner.run(chosen, resume=args.resume, overwrite=args.overwrite, observer=watch)
    except (ConfigError, DataError) as error:
        raise _Fault(str(error)) from error
    except RoundFailed as error:
        raise _Fault(f"{error}; draw it again with: {going_on()}", 1) from error
    except WorkerDied as error:
        raise _Fault(f"{error}; go on with: {going_on()}", 3) from error
    except KeyboardInterrupt:
        how = "go on" if watch.begun else "nothing was written; start again"
        raise _Fault(f"interrupted; {how} with: {going_on()}", 130) from None
    except OutputClosed as error:
        _silence()
        text = f"standard output cannot be written: {error}; go on with: {going_on()}"
        raise _Fault(text, 3) from error
    except OSError as error:
        raise _Fault(f"{_said(error)}; go on with: {going_on()}", 3) from error
    finally:
        watch.close()
    return 0


def _seeds(args: argparse.Namespace, given: dict[str, Any]) -> int:
    from fedmap_sparse.experiments import commands

    if args.show_partition:
        raise ConfigError("seeds: --show-partition shows that of one, seed=0 say")
    try:
        return commands.run_seeds(given, overwrite=args.overwrite)
    except KeyboardInterrupt:
        raise _stopped(args) from None


def _sweep(args: argparse.Namespace) -> int:
    from fedmap_sparse.experiments import commands

    _need_safetensors()
    try:
        return commands.run_sweep(
            args.file,
            args.words,
            out=args.out,
            data=args.data,
            jobs=args.jobs,
            overwrite=args.overwrite,
        )
    except ConfigError as error:
        raise _Fault(str(error)) from error
    except KeyboardInterrupt:
        raise _stopped(args) from None


def _stopped(args: argparse.Namespace) -> _Fault:
    words = [w for w in sys.argv[1:] if w != "--overwrite"] if args.argv is None else args.argv
    return _Fault(f"interrupted; go on with: {_command.again(words)}", 130)


def _compare(args: argparse.Namespace) -> int:
    from fedmap_sparse.experiments import commands

    try:
        return commands.compare(args.paths, args.json)
    except ConfigError as error:
        raise _Fault(str(error)) from error


def _report(args: argparse.Namespace) -> int:
    from fedmap_sparse.experiments import commands

    try:
        return commands.report(args.folder, args.out)
    except ConfigError as error:
        raise _Fault(str(error)) from error


def _need_safetensors() -> None:
    if importlib.util.find_spec("safetensors") is None:
        raise _Fault("safetensors is not installed; pip install 'fedmap-sparse[experiments]'")
    importlib.import_module("safetensors.torch")


def _inspect(args: argparse.Namespace) -> int:
    from fedmap_sparse import codec

    try:
        text = str(codec.inspect_file(args.file))
    except OSError as error:
        raise _Fault(f"{args.file}: cannot be read: {error.strerror}") from error
    except FormatError as error:
        raise _Fault(f"{args.file}: no message, or damaged: {error}") from error
    say(*text.split("\n"))
    return 0


def _info(args: argparse.Namespace) -> int:
    import torch

    from fedmap_sparse import _backends

    rows = {
        "fedmap-sparse": __version__,
        "python": f"{platform.python_version()}, {platform.platform()}",
        "torch": torch.__version__,
        **{name: _version(name) for name in ("numpy", "triton")},
    }
    rows |= {f"backend {name}": state for name, state in _backends.backends().items()}
    native = _backends.native
    if native is not None:
        rows["isa"] = f"{native.isa()} (this machine: {', '.join(native.isa_levels())})"
    forced = ("FEDMAP_SPARSE_BACKEND", "FEDMAP_SPARSE_ISA")
    rows |= {name: os.environ[name] for name in forced if name in os.environ}
    rows["processor"] = _processor()
    rows["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} processors"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            rows[f"gpu {i}"] = (
                f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}, "
                f"CUDA {torch.version.cuda}"
            )
    else:
        rows["gpu"] = "none that torch can use"
    width = max(map(len, rows))
    say(*(f"{name:<{width}}  {text}" for name, text in rows.items()))
    return 0


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({platform.machine()})"
