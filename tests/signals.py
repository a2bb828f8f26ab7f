# SPDX-License-Identifier: Apache-2.0
"""A SIGTERM to this process at a known moment of its training."""

import os
import signal

import pytest

from hubert_jax import stopping


def come(patched: pytest.MonkeyPatch, *, call: int = 0, compilation: int = 0) -> None:
    """At the n-th time, from 1, that a program of training is run (`call`: steps and batches of
    validation count), or just before it is compiled (`compilation`).
    """
    counts = {"call": 0, "compilation": 0}

    def count(what: str, wanted: int) -> None:
        counts[what] += 1
        if counts[what] == wanted:
            os.kill(os.getpid(), signal.SIGTERM)

    class Signalling:
        def __init__(self, function):
            self.function = function

        def lower(self, *args):
            count("compilation", compilation)
            return self.function.lower(*args)

        def __call__(self, *args):
            count("call", call)
            return self.function(*args)

    interruptible = stopping.interruptible
    patched.setattr(
        stopping,
        "interruptible",
        lambda function, ahead=(): interruptible(Signalling(function), ahead),
    )
