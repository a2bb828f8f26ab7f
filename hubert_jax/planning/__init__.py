# SPDX-License-Identifier: Apache-2.0
"""What a training step will take on chips that are not here: `hubert plan`.

`chips` are the machines' public figures, `compiled` is what XLA says of the real step, compiled for
a TPU topology, `hlo` reads that from its text, `estimate` counts the same by hand, for any chip,
`scaling` sets both beside each other for more and more devices.
"""
