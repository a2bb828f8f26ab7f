# SPDX-License-Identifier: Apache-2.0
"""The walls: imports point downwards, and each neighbour is known to one file only."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "hubert_jax").rglob("*.py"))

# A file may import from its own floor and from those below.
FLOORS = (
    ("ops",),
    ("data",),
    (
        *("processes", "sharding", "weights", "optim", "logs", "train", "config_files"),
        *("watch", "stopping", "owners", "locks", "bucket_locks"),
    ),
    (
        "layers",
        "positions",
        "attention",
        "flash",
        "convolutions",
        "blocks",
        "norms",
        "gelus",
        "strided",
        "model",
        "heads",
        "pretraining",
        "checkpoints",
        "extract",
        "encode",
        "frame_files",
    ),
    ("interchange",),
    ("parity", "bench", "planning", "doctor"),
    ("stages",),
    ("", "cli"),  # "": the package itself
)
DATA, STAGES = 1, 6
BENCH = "hubert_jax/bench/peers.py"
MINIMAL = "hubert_jax/bench/minimal.py"
ONLY_IN: dict[str, tuple[str, ...]] = {
    "tensorstore": ("hubert_jax/bucket_locks.py",),
    "orbax": ("hubert_jax/checkpoints.py",),
    "tensorflow_datasets": ("hubert_jax/data/assembly.py", "hubert_jax/data/corpus.py"),
    "espeakng_loader": ("hubert_jax/data/synth.py",),
    "tensorboardX": ("hubert_jax/logs.py",),
    "torch": ("hubert_jax/interchange/tensors.py", "hubert_jax/parity/peers.py", BENCH, MINIMAL),
    "minimal_hubert": (MINIMAL,),
    "transformers": ("hubert_jax/parity/peers.py", BENCH),
    "torchaudio": ("hubert_jax/parity/peers.py", BENCH),
    "fairseq": ("hubert_jax/parity/peers.py",),
    "tensorflow": (),
}


def floor(module: str) -> int:
    room = module.split(".")[1] if "." in module else ""
    found = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    assert found, f"{module} is new: say in FLOORS where it lives"
    return found[0]


def imports(tree: ast.Module):
    """Every imported module, also those within functions; a name may be a module or an object."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_keeps_to_its_floor(path):
    name = str(path.relative_to(ROOT))
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    tree = ast.parse(path.read_text())
    for target in imports(tree):
        package = target.split(".")[0]
        if package == "hubert_jax" and target != "hubert_jax.__version__":
            assert floor(target) <= floor(module), f"{name} imports {target}, which lies above it"
            to_stage = target.startswith("hubert_jax.stages")
            assert not (to_stage and floor(module) == STAGES), f"{name}, a stage, imports {target}"
        homes = ONLY_IN.get(package, (name,))
        assert name in homes, f"{package} belongs into {' or '.join(homes) or 'no file'}"
        if floor(module) <= DATA:
            assert package != "flax", f"{name} is below the models"
    if name != "hubert_jax/sharding.py":
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        made = {c for c in calls if c == "jax.make_mesh" or re.fullmatch(r"(.*\.)?Mesh", c)}
        assert not made, f"{name} makes a mesh with {made}; that is sharding.py's"


def test_the_walls_stop_what_they_should():
    assert floor("hubert_jax.ops.mfcc") < floor("hubert_jax.data.corpus.Corpus")
    assert floor("hubert_jax.model") < floor("hubert_jax.stages.label") < floor("hubert_jax.cli")
    assert [*imports(ast.parse("def f():\n    from hubert_jax.stages import label"))] == [
        "hubert_jax.stages.label"
    ]


@pytest.mark.parametrize("folder", ["hubert_jax", "configs", "tests", "launch"])
def test_source_is_ascii_and_says_its_licence(folder):
    for path in [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".sh")]:
        head = path.read_text(encoding="ascii").splitlines()[:2]
        assert any("SPDX-License-Identifier: Apache-2.0" in line for line in head), path
