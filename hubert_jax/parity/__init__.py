# SPDX-License-Identifier: Apache-2.0
"""Whether we compute what others compute: what a peer did, and how far we are from it.

`peers` runs transformers, torchaudio and fairseq on random weights and keeps everything on the way
as a `record`; `goldens/` holds small ones for where they are not installed; `compare` runs ours.
"""
