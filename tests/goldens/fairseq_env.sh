#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes an environment in $VENV in which fairseq 0.12.2's HuBERT runs on Python 3.11, CPU only.
#   VENV=DIR [PYTHON=python3.11] tests/goldens/fairseq_env.sh
set -euo pipefail
python=$VENV/bin/python
pip() { "$python" -m pip --quiet --disable-pip-version-check "$@"; }

"${PYTHON:-python3.11}" -m venv "$VENV"
# a newer pip refuses omegaconf 2.0.6, whose metadata is not valid
pip install pip==23.2.1 setuptools==80.9.0 wheel==0.45.1
pip install torch==2.13.0 # first, so that nothing brings another build
pip install numpy==1.26.4 PyYAML==6.0.2 regex tqdm bitarray==3.0.0 portalocker tabulate colorama lxml
pip install --no-deps sacrebleu==2.5.1 omegaconf==2.0.6 hydra-core==1.0.7
pip install --no-deps --no-build-isolation antlr4-python3-runtime==4.8

# Its Python files alone: HuBERT imports none of the compiled parts, which do not build here.
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
unpacked=$(mktemp -d)
trap 'rm -rf "$unpacked"' EXIT
pip download --no-deps --no-build-isolation --no-binary :all: -d "$unpacked" fairseq==0.12.2
tar -xzf "$unpacked"/fairseq-0.12.2.tar.gz -C "$unpacked"
cp -rL "$unpacked"/fairseq-0.12.2/fairseq "$unpacked"/fairseq-0.12.2/fairseq_cli "$packages"

# torch >= 2.6 unpickles only when told to; numpy 1.24 dropped these names
sed -i 's/map_location=torch.device("cpu"))/map_location=torch.device("cpu"), weights_only=False)/' \
    "$packages"/fairseq/checkpoint_utils.py
sed -i 's/np\.int,/int,/' "$packages"/fairseq/data/data_utils.py
sed -i 's/np\.float("inf")/float("inf")/' "$packages"/fairseq/modules/dynamic_crf_layer.py

# Python 3.11 wants defaults of dataclasses hashable, which those of hydra and fairseq are not.
cat >"$packages"/hashable_defaults.py <<'PYTHON'
import dataclasses

collect = dataclasses._get_field


def collect_hashable(cls, name, *others):
    default = getattr(cls, name, None)
    kind = type(getattr(default, "default", default))
    if not dataclasses.is_dataclass(kind) or kind.__hash__ is not None:
        return collect(cls, name, *others)
    kind.__hash__ = object.__hash__
    try:
        return collect(cls, name, *others)
    finally:
        kind.__hash__ = None


dataclasses._get_field = collect_hashable
PYTHON
echo 'import hashable_defaults' >"$packages"/hashable_defaults.pth
"$python" -W ignore -c 'import fairseq.models.hubert, fairseq.tasks.hubert_pretraining'
