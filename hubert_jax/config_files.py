# SPDX-License-Identifier: Apache-2.0
"""Config files: Python with get_config(iteration), and overrides from the command line."""

import argparse
import difflib
import importlib.util
import pathlib
import shlex
from collections.abc import Sequence


def load(config: str, overrides: Sequence[str] = ()):
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
    """`load`, whose errors are errors of usage."""
    try:
        return load(config, overrides)
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


def unknown(what: str, name: str, known: Sequence[str]) -> str:
    """'unknown stage 'lable': did you mean 'label'? There are: ...'."""
    near = difflib.get_close_matches(name, known, n=2)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"unknown {what} {name!r}.{hint} There are: {', '.join(known)}"
