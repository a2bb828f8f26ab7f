# SPDX-License-Identifier: Apache-2.0
"""`hubert STAGE ...`: finds the stage, builds its config, and speaks plainly when something fails.

Only the stage asked for is imported, and only once its arguments are understood.
"""

import argparse
import ast
import difflib
import importlib
import importlib.util
import logging
import pathlib
import pkgutil
import shlex
import sys
import traceback
from collections.abc import Sequence

from hubert_jax import stages

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
        print(f"hubert: {unknown('stage', stage, names)}", file=sys.stderr)
        sys.exit(2)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of files it never wrote
    show_traceback = "--traceback" in rest
    rest = [word for word in rest if word != "--traceback"]
    go_on = shlex.join(["hubert", *argv])
    try:
        if stage in CONFIG_STAGES:
            run_config_stage(stage, rest)
        else:
            importlib.import_module(f"hubert_jax.stages.{stage}").main(rest)
    except KeyboardInterrupt as error:
        reason = str(error) or "interrupted"
        print(f"\nhubert {stage}: {reason}. To go on:\n  {go_on}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:  # for people to mend, the rest is ours
        if show_traceback:
            traceback.print_exc()
        print(f"hubert {stage}: error: {str(error) or type(error).__name__}", file=sys.stderr)
        print(f"Once that is mended, go on with:\n  {go_on}", file=sys.stderr)
        sys.exit(1)
    except Exception:
        print(f"hubert {stage}: failed. To go on:\n  {go_on}", file=sys.stderr)
        raise


def run_config_stage(stage: str, argv: list[str]) -> None:
    overrides, words = split_overrides(argv)
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
    args = parser.parse_args(words)

    if args.help:
        parser.print_help()
        if args.config:
            print("\n" + "\n".join(described(configured(parser, args.config, overrides))))
        return
    if not args.config or not args.workdir:
        parser.error("--config=FILE and --workdir=FOLDER are needed")
    path, _, iteration = args.config.partition(":")
    config = configured(parser, args.config, overrides)
    if stage == "run" and iteration:
        parser.error(f"run walks every iteration of a config: give --config={path}")

    from etils import epath

    workdir = epath.Path(args.workdir)
    module = importlib.import_module(f"hubert_jax.stages.{stage}")
    if stage == "run":
        module.run(lambda name: configured(parser, f"{path}:{name}", overrides), workdir)
    else:
        module.run(config, workdir)


# The overview and the help, read off the stages' docstrings without importing them.


def stage_names() -> list[str]:
    """Every file of stages/, the pipeline's arrows first."""
    found = [module.name for module in pkgutil.iter_modules(stages.__path__)]
    arrows = [name for name in CONFIG_STAGES if name in found]
    return arrows + sorted(set(found) - set(arrows))


def overview(names: Sequence[str]) -> str:
    summaries = {name: docstring(name).splitlines()[0] for name in names}
    lines = [
        f"  {name:<10}{text.removeprefix(f'hubert {name}:')}" for name, text in summaries.items()
    ]
    return OVERVIEW.format(stages="\n".join(lines))


def docstring(stage: str) -> str:
    spec = importlib.util.find_spec(f"hubert_jax.stages.{stage}")
    assert spec is not None and spec.origin is not None
    return ast.get_docstring(ast.parse(pathlib.Path(spec.origin).read_text())) or ""


def unknown(what: str, name: str, known: Sequence[str]) -> str:
    """'unknown stage 'lable': did you mean 'label'? There are: ...'."""
    near = difflib.get_close_matches(name, known, n=2)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"unknown {what} {name!r}.{hint} There are: {', '.join(known)}"


# Configs: a Python file with get_config(iteration), and overrides from the command line.


def load_config(config: str, overrides: Sequence[str] = ()):
    """The ConfigDict of 'FILE[:ITERATION]' with overrides like '--config.optim.peak_lr=3e-4'.

    Raises ValueError for an unknown iteration, an unknown field or a value of the wrong type,
    FileNotFoundError for a missing file.
    """
    from absl import flags
    from ml_collections import config_flags

    path, _, iteration = config.partition(":")
    spec = importlib.util.spec_from_file_location("hubert_config", path)
    if spec is None or spec.loader is None or not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"--config={path}: there is no such Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tree = module.get_config(*([iteration] if iteration else []))
    if tree.iteration not in tree.iterations:
        raise ValueError(f"{path}: {unknown('iteration', tree.iteration, tree.iterations)}")

    for override in overrides:
        check_field(tree, override.partition("=")[0])
    flag_values = flags.FlagValues()  # our own: absl's global flags stay untouched
    config_flags.DEFINE_config_dict("config", tree, flag_values=flag_values, sys_argv=overrides)
    try:
        flag_values(["hubert", *overrides])
    except flags.IllegalFlagValueError as error:
        raise ValueError(str(error).removeprefix("flag ")) from None
    return flag_values.config


def configured(parser: argparse.ArgumentParser, config: str, overrides: Sequence[str]):
    """load_config, whose errors are errors of usage."""
    try:
        return load_config(config, overrides)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits off the words that set fields: '--config.a.b=3', also written '--config.a.b 3'."""
    overrides, others, words = [], [], iter(argv)
    for word in words:
        if not word.startswith("--config."):
            others.append(word)
        elif "=" in word:
            overrides.append(word)
        else:
            overrides.append(f"{word}={next(words, '')}")
    return overrides, others


def check_field(tree, flag: str) -> None:
    """Raises ValueError unless '--config.section.field' names a field that the config has."""
    node, above = tree, "--config"
    for name in flag.removeprefix("--config.").split("."):
        if not hasattr(node, "keys"):
            raise ValueError(f"{flag}: {above} is a value, it has no fields")
        if name not in node:
            raise ValueError(f"{flag}: {unknown('field', name, sorted(node))}")
        node, above = node[name], f"{above}.{name}"
    if hasattr(node, "keys"):
        raise ValueError(f"{flag} is a section: set one of its fields, {', '.join(sorted(node))}")


def described(tree, prefix: str = "--config") -> list[str]:
    """A config as the flags that would set it."""
    lines = []
    for name, value in sorted(tree.items()):
        if hasattr(value, "items"):
            lines += described(value, f"{prefix}.{name}")
        else:
            lines.append(f"  {prefix}.{name}={shlex.quote(str(value))}")
    return lines
