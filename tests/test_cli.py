# SPDX-License-Identifier: Apache-2.0
"""The command line: what it says, with which exit code, and how little it loads."""

import os
import subprocess
import sys
import time
import types

import pytest

from hubert_jax import cli, config_files

CONFIG = """
import ml_collections

def get_config(iteration="it1"):
    config = ml_collections.ConfigDict(dict(
        iteration=iteration, iterations=("it1", "it2"), seed=0, teacher="nobody",
        optim=dict(peak_lr=1e-3, warmup_steps=10), batch=dict(rungs=(2.0, 4.0)),
        model=dict(wide=True), features=dict(checkpoint=""),
    ))
    if iteration == "it1":
        config.features.checkpoint = config.get_ref("teacher")
    return config
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def stage(monkeypatch):
    """A stage whose calls are kept, in the place of the real `label`."""
    calls = []
    module = types.SimpleNamespace(calls=calls, run=lambda *args: calls.append(args))
    monkeypatch.setitem(sys.modules, "hubert_jax.stages.label", module)
    monkeypatch.setattr(cli, "stage_names", lambda: ["run", "label"])
    monkeypatch.setattr(cli, "docstring", lambda stage: "Assigns labels.")
    return module


def failure(argv, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    return exit_.value.code, capsys.readouterr().err


def test_help_is_quick_and_loads_neither_jax_nor_configs():
    program = (
        "import sys; from hubert_jax import cli; cli.main(['--help']);"
        "print({'jax', 'numpy', 'ml_collections', 'absl'} & {*sys.modules})"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True
    )
    assert done.stdout.endswith("set()\n")
    assert "pretrain" in done.stdout and "export" in done.stdout
    assert "  import     what other" in done.stdout
    assert time.monotonic() - started < 3.0  # 0.07 s when nothing else runs


def test_stage_gets_config_and_workdir(config, stage, tmp_path):
    flags = ["--config.optim.peak_lr=3e-4", "--config.seed", "7", "--config.batch.rungs=(1.5,)"]
    cli.main(["label", f"--config={config}:it2", f"--workdir={tmp_path}", *flags])
    ((built, workdir),) = stage.calls
    assert (built.iteration, built.seed, built.batch.rungs) == ("it2", 7, (1.5,))
    assert built.optim.peak_lr == 3e-4 and built.optim.warmup_steps == 10
    assert str(workdir) == str(tmp_path)


def test_a_referenced_field_follows_its_source(config):
    load = config_files.load
    assert load(f"{config}:it1", ["--config.teacher=x"]).features.checkpoint == "x"
    assert load(f"{config}:it2", ["--config.teacher=x"]).features.checkpoint == ""


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.optim.peak_rl=1", "'peak_rl'. Did you mean 'peak_lr'? There are: peak_lr, warm"),
        ("--config.optin.peak_lr=1", "'optin'. Did you mean 'optim'? There are: batch, features"),
        ("--config.seed.x=1", "--config.seed is a value"),
        ("--config.optim=1", "--config.optim is a section"),
        ("--config.optim.warmup_steps=1.5", "--config.optim.warmup_steps=1.5: invalid literal"),
        ("--config.model.wide=perhaps", "--config.model.wide=perhaps"),
        ("--konfig=1", "--konfig"),
    ],
)
def test_unknown_fields_and_wrong_types_are_errors_of_usage(flag, message, config, stage, capsys):
    code, err = failure(["label", f"--config={config}", "--workdir=w", flag], capsys)
    assert code == 2 and message in err and "Traceback" not in err
    assert not stage.calls


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["lable"], "unknown stage 'lable'. Did you mean 'label'? There are: run, label"),
        (["label"], "--config=FILE and --workdir=FOLDER are needed"),
        (["label", "--config=none.py", "--workdir=w"], "none.py: there is no such Python file"),
        (["label", "--config={}:it3", "--workdir=w"], "unknown iteration 'it3'. Did you mean"),
        (["run", "--config={}:it1", "--workdir=w"], "run walks every iteration"),
    ],
)
def test_misuse_names_the_remedy(argv, message, config, stage, capsys):
    code, err = failure([word.format(config) for word in argv], capsys)
    assert code == 2 and message in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("K 500 is more than 20 frames"), 1, "label: error: K 500 is more than 20"),
        (OSError(28, "No space left on device", "/full"), 1, "No space left on device: '/full'"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failures_end_with_the_command_to_go_on_with(
    error, code, message, config, stage, capsys, monkeypatch
):
    def fail(*_):
        raise error

    monkeypatch.setattr(stage, "run", fail)
    argv = ["label", f"--config={config}:it2", "--workdir=my folder", "--config.seed=1"]
    found, err = failure(argv, capsys)
    assert found == code and message in err and "Traceback" not in err
    assert err.endswith(
        f"hubert label --config={config}:it2 '--workdir=my folder' --config.seed=1\n"
    )
    assert failure([*argv, "--traceback"], capsys)[1].count("Traceback") == (code == 1)


def test_help_of_a_stage_shows_its_docstring_and_the_config(config, stage, capsys):
    cli.main(["label", "--help", f"--config={config}", "--config.seed=5"])
    shown = capsys.readouterr().out
    assert "Assigns labels." in shown
    assert "--config.seed=5" in shown and "--config.optim.warmup_steps=10" in shown


def test_stages_that_are_not_driven_by_a_config_get_their_words(monkeypatch):
    calls = []
    module = types.SimpleNamespace(main=calls.append)
    monkeypatch.setitem(sys.modules, "hubert_jax.stages.export", module)
    monkeypatch.setattr(cli, "stage_names", lambda: ["export"])
    cli.main(["export", "units", "--layer=6"])
    assert calls == [["units", "--layer=6"]]


def test_compiled_programs_are_kept_where_jax_was_not_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", {"XDG_CACHE_HOME": str(tmp_path)})
    cli.keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"].startswith(str(tmp_path / "hubert_jax"))
    monkeypatch.setattr(os, "environ", {"JAX_COMPILATION_CACHE_DIR": "mine"})
    cli.keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine"
