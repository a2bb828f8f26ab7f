# SPDX-License-Identifier: Apache-2.0
"""Training that goes wrong, noticed while it runs and said in words.

`Watch.step` sees the metrics of every step: it reports steps that were skipped because a number was
not finite, stops the run where there are too many, and reports a loss that jumps. `of_training` and
`of_validation` look at means for a model that predicts one code, or whose features are all alike.

C codes
"""

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hubert_jax import logs

WINDOW = 200  # steps that are looked back upon
MAX_SKIPPED = 10  # of these; one bad file in a large corpus is seen once an epoch
MIN_HISTORY = 30  # steps before a loss can be called a jump
JUMP = 8.0  # robust standard deviations above the median of the window, and
JUMP_SHARE = 0.1  # at least this much of the median
ONE_CODE = 1.5  # perplexity of predictions at and below which it is one code that is predicted
SAME_FEATURES = 0.01  # share of the features' size that differs between frames
SAME_LOGITS = 0.01  # spread of logits, whose range is +-10 for a temperature of 0.1
BACK = "Go back to an earlier checkpoint and lower optim.peak_lr"
DEAD_SHARE = 0.1  # of the codes in the labels that a model at work predicts at least


class Diverged(ValueError):
    """Too many steps had numbers that are not finite; the weights are those before them."""


class Watch:
    """What is remembered of the last steps.

    `utterances(step)` are the ids in the batch of a step, `checkpoint()` is the newest in words.
    """

    def __init__(
        self,
        title: str,
        *,
        utterances: Callable[[int], Sequence[str]],
        checkpoint: Callable[[], str],
        warn: Callable[[str], None] = logs.info,
    ):
        self._title, self._utterances, self._checkpoint = title, utterances, checkpoint
        self._warn = warn
        self._losses: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._skipped: collections.deque[int] = collections.deque()
        self._num_skipped = 0
        self._last_jump = -WINDOW
        self._said: set[str] = set()

    def step(self, step: int, sums: Mapping[str, tuple[float, float]]) -> None:
        """Looks at one step's (sum, count) pairs. Raises Diverged."""
        if sums["skipped"][0]:
            self._skip(step)
            return
        total, count = sums["loss"]
        loss = float(total) / float(count)
        if _is_jump(loss, self._losses) and step - self._last_jump >= WINDOW:
            self._last_jump = step
            self._warn(
                f"{self._title}: step {step}: the loss jumped to {loss:.3f}, the last"
                f" {len(self._losses)} steps had {np.median(self._losses):.3f}; gradient norm"
                f" {float(sums['gradient_norm'][0]):.3g}. If it does not come down again, lower"
                f" optim.peak_lr. Its utterances: {', '.join(self._utterances(step))}"
            )
        self._losses.append(loss)

    def say(self, step: int, findings: Sequence[str]) -> None:
        """Prints findings, each once until it has gone away."""
        for finding in findings:
            if finding not in self._said:
                self._warn(f"{self._title}: step {step}: {finding}")
        self._said = set(findings)

    def _skip(self, step: int) -> None:
        self._num_skipped += 1
        self._skipped.append(step)
        while self._skipped[0] <= step - WINDOW:
            self._skipped.popleft()
        self._warn(
            f"{self._title}: step {step}: loss or gradient is not finite; the weights were left as"
            f" they were ({self._num_skipped} such steps so far). Its utterances:"
            f" {', '.join(self._utterances(step))}"
        )
        if len(self._skipped) > MAX_SKIPPED:
            raise Diverged(
                f"{len(self._skipped)} of the last {WINDOW} steps, up to step {step}, had a loss or"
                " gradient that is not finite. The newest checkpoint is good:"
                f" {self._checkpoint()}. Where the same utterances come again, leave them out"
                " (corpus.exclude); else lower optim.peak_lr or set"
                " model.compute_dtype=float32, in a new work directory"
            )


def _is_jump(loss: float, history: Sequence[float]) -> bool:
    if len(history) < MIN_HISTORY:
        return False
    median = float(np.median(history))
    deviation = 1.4826 * float(np.median(np.abs(np.array(history) - median)))
    return loss > median + max(JUMP * deviation, JUMP_SHARE * abs(median))


def of_training(values: Mapping[str, float]) -> list[str]:
    """What is wrong with the means since the last report, by label set."""
    found = []
    for suffix in _label_sets(values, "predicted_perplexity"):
        predicted = values[f"predicted_perplexity{suffix}"]
        labelled = values[f"label_perplexity{suffix}"]
        if predicted <= ONE_CODE < labelled / 2:
            found.append(
                f"the model predicts one code (perplexity of its predictions{suffix} at most"
                f" {ONE_CODE}, of the labels {labelled:.0f}): it has learnt how frequent codes are"
                " and nothing of the audio. If this lasts, lower optim.peak_lr, or see that the"
                " labels belong to the audio with hubert doctor"
            )
    return found


def of_validation(values: Mapping[str, float]) -> list[str]:
    """What is wrong with features and with the use of codes, over the whole validation set."""
    found = []
    if values["feature_spread"] <= SAME_FEATURES:
        found.append(
            f"the features have collapsed: less than {SAME_FEATURES:.0%} of their size differs from"
            f" frame to frame. {BACK}"
        )
    for suffix in _label_sets(values, "codes_predicted"):
        predicted, labelled = values[f"codes_predicted{suffix}"], values[f"codes_labelled{suffix}"]
        if values[f"logit_spread{suffix}"] <= SAME_LOGITS:
            found.append(
                f"the predictions have collapsed: logits{suffix} vary by less than {SAME_LOGITS}"
                f" from frame to frame. {BACK}"
            )
        elif labelled > 1 and predicted <= 1:
            found.append(f"the model predicts one code{suffix} for all of the validation set")
        elif predicted < DEAD_SHARE * labelled:
            found.append(
                f"most codes{suffix} are dead: fewer than {DEAD_SHARE:.0%} of the {labelled:.0f} in"
                " the labels of the validation set are ever predicted"
            )
    return found


def usage(batches: Sequence[Sequence[Any]]) -> dict[str, float]:
    """The use of codes, summed over batches of `pretraining.Usage` for every label set."""
    values: dict[str, float] = {}
    for g, of_set in enumerate(zip(*batches, strict=True)):
        suffix = "" if g == 0 else f"_{g}"
        for name in ("labelled", "predicted"):
            counts_C = sum(getattr(batch, f"{name}_C") for batch in of_set)
            values[f"codes_{name}{suffix}"] = float(np.count_nonzero(counts_C))
        values[f"logit_spread{suffix}"] = math.fsum(float(b.spread) for b in of_set) / len(of_set)
    return values


def _label_sets(values: Mapping[str, float], name: str) -> list[str]:
    """The suffixes ('', '_1', ...) with which a name occurs."""
    return [found.removeprefix(name) for found in values if found.startswith(name)]
