# SPDX-License-Identifier: Apache-2.0
"""`hubert STAGE ...`: finds the stage, builds its config, and speaks plainly when something fails.

Only the stage asked for is imported, and only once its arguments are understood.
"""

import argparse
import ast
import importlib
import importlib.util
import keyword
import logging
import os
import pathlib
import pkgutil
import platform
import shlex
import sys
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from hubert_jax import config_files, stages

# Stages with `run(config, workdir)`, in the order of the arrows. All others have `main(argv)`.
CONFIG_STAGES = ("run", "prepare", "features", "cluster", "label", "pretrain")

OVERVIEW = """\
usage: hubert STAGE ...

audio --prepare--> corpus --features--> frames --cluster--> codebook --label--> labels
labels --pretrain--> checkpoint, whose layers are the features of the next iteration

{stages}

All of it: hubert run --config=configs/demo.py --workdir=work/demo
One stage: hubert STAGE --help
"""

CONFIG_USAGE = """\
Every field of the config can be given on the command line: --config.optim.peak_lr=3e-4
Add --config=FILE to --help to see them all. Unknown fields are errors.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """The console script. Exit codes: 1 failed, 2 misused, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    names = stage_names()
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview(names), end="")
        return
    stage, rest = argv[0], argv[1:]
    if stage not in names:
        print(f"hubert: {config_files.unknown('stage', stage, names)}", file=sys.stderr)
        sys.exit(2)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of files it never wrote
    keep_compiled_programs()
    from hubert_jax.data import leftovers

    leftovers.sweep()
    show_traceback = "--traceback" in rest
    rest = [word for word in rest if word != "--traceback"]
    go_on = shlex.join(["hubert", *argv])
    try:
        if stage in CONFIG_STAGES:
            run_config_stage(stage, rest)
        else:
            importlib.import_module(module_name(stage)).main(rest)
    except KeyboardInterrupt as error:
        reason = str(error) or "interrupted"
        print(f"\nhubert {stage}: {reason}. To go on:\n  {go_on}", file=sys.stderr)
        train = sys.modules.get("hubert_jax.train")
        imported = sys.modules.get("hubert_jax.processes")
        if imported is not None and hasattr(imported, "leave"):  # else that was interrupted
            imported.leave(130, together=isinstance(error, getattr(train, "Interrupted", ())))
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:  # for people to mend, the rest is ours
        from hubert_jax import processes

        if show_traceback:
            traceback.print_exc()
        reason = str(error) or type(error).__name__
        print(f"hubert {stage}: error{processes.name()}: {reason}", file=sys.stderr)
        print(f"Once that is mended, go on with:\n  {go_on}", file=sys.stderr)
        processes.leave(1, together=False)
    except Exception:
        from hubert_jax import processes

        print(f"hubert {stage}: failed{processes.name()}. To go on:\n  {go_on}", file=sys.stderr)
        if processes.this()[1] == 1:
            raise
        traceback.print_exc()
        processes.leave(1, together=False)


def keep_compiled_programs() -> None:
    """XLA's programs are kept between runs, each machine's apart, so a second start compiles none.

    JAX's own variables go before: JAX_COMPILATION_CACHE_DIR is another folder,
    JAX_ENABLE_COMPILATION_CACHE=false keeps nothing. Only JAX reads them, as it is imported.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # A program compiled for one processor may crash on another that shares the home folder.
    folder = os.path.join(cache, "hubert_jax", platform.node())
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def run_config_stage(stage: str, argv: list[str]) -> None:
    overrides, words = config_files.split_overrides(argv)
    parser = argparse.ArgumentParser(
        prog=f"hubert {stage}",
        usage=f"hubert {stage} --config=FILE[:ITERATION] --workdir=FOLDER [--config.FIELD=VALUE]",
        description=docstring(stage),
        epilog=CONFIG_USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this, and the config")
    parser.add_argument("--config", metavar="FILE[:ITERATION]", help="a file of configs/")
    parser.add_argument("--workdir", metavar="FOLDER", help="where everything is written")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    several = parser.add_argument_group(
        "several processes", "not needed under srun, mpirun or on a slice of TPU hosts on GKE"
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0; auto: jax looks")
    several.add_argument("--num_processes", type=int, metavar="N", help="that run this command")
    several.add_argument("--process_id", type=int, metavar="I", help="of this one, from 0")
    several.add_argument(
        "--heartbeat_timeout", type=int, default=100, metavar="SECONDS",
        help="after which a silent process is given up, and the others are ended (100)",
    )  # fmt: skip
    args = parser.parse_args(words)

    if args.help:
        parser.print_help()
        if args.config:
            config = config_files.configured(parser, args.config, overrides)
            print("\n" + "\n".join(config_files.described(config)))
        return
    if not args.config or not args.workdir:
        parser.error("--config=FILE and --workdir=FOLDER are needed")
    path, _, iteration = args.config.partition(":")
    config = config_files.configured(parser, args.config, overrides)
    if stage == "run" and iteration:
        parser.error(f"run walks every iteration of a config: give --config={path}")

    join(args)
    from etils import epath

    from hubert_jax import owners, processes

    workdir = epath.Path(args.workdir)
    module = importlib.import_module(module_name(stage))
    with one_at_a_time(stage, workdir):
        processes.wait_long("lock", seconds=2 * owners.STALE)
        if stage == "run":
            get = config_files.configured
            module.run(lambda name: get(parser, f"{path}:{name}", overrides), workdir)
        else:
            module.run(config, workdir)


def one_at_a_time(stage: str, workdir) -> AbstractContextManager[None]:
    """The lock of a work directory, for whatever writes into it; the first process holds it."""
    from hubert_jax import locks, processes

    return locks.held(workdir, f"hubert {stage}") if processes.is_first() else nullcontext()


def join(args: argparse.Namespace) -> None:
    """Finds the other processes of the run, if there are any; only the first one talks."""
    from hubert_jax import logs, processes

    others = processes.told(args.coordinator, args.num_processes, args.process_id, os.environ)
    processes.join(others, heartbeat_timeout=args.heartbeat_timeout)
    if not processes.is_first():
        logs.silence()


# The overview and the help, read off the stages' docstrings without importing them.


def stage_names() -> list[str]:
    """Every file of stages/, the pipeline's arrows first."""
    found = [module.name.removesuffix("_") for module in pkgutil.iter_modules(stages.__path__)]
    arrows = [name for name in CONFIG_STAGES if name in found]
    return arrows + sorted(set(found) - set(arrows))


def module_name(stage: str) -> str:
    """`import` is a word of Python's own, so its stage is called import_."""
    return f"hubert_jax.stages.{stage}{'_' if keyword.iskeyword(stage) else ''}"


def overview(names: Sequence[str]) -> str:
    summaries = {name: docstring(name).splitlines()[0] for name in names}
    lines = [
        f"  {name:<10}{text.removeprefix(f'hubert {name}:')}" for name, text in summaries.items()
    ]
    return OVERVIEW.format(stages="\n".join(lines))


def docstring(stage: str) -> str:
    spec = importlib.util.find_spec(module_name(stage))
    assert spec is not None and spec.origin is not None
    return ast.get_docstring(ast.parse(pathlib.Path(spec.origin).read_text())) or ""
