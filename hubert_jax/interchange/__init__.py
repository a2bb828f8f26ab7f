# SPDX-License-Identifier: Apache-2.0
"""Models of other stacks: transformers, fairseq and torchaudio, read and written.

Each format is a file with `read(path)` and `write(model, path)`; between them travels
`heads.Weights`, a model at rest under our own names.
"""
