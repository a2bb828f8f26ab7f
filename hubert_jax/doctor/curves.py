# SPDX-License-Identifier: Apache-2.0
"""A running job: whether its loss is normal, alone and beside curves of our own runs.

curves.json has runs of ours, [step, masked loss, masked accuracy], and the recipes that decide
them. A run of the same recipe is held against its curve; the same model on another schedule is told
of it; base is held against what others report, and any run against what needs no model
(labels.Guesses).
"""

import importlib.resources
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hubert_jax import watch
from hubert_jax.doctor.findings import Finding, graded, ok
from hubert_jax.doctor.labels import Guesses

TOLERANCE = 0.1  # of ln K, by which a loss may differ from the curve of the same recipe
RISE = 0.1  # of the lowest loss, by which a loss may have risen again
MAX_START = 1.5  # times ln K; untrained logits are not yet small
TOO_GOOD = 0.9  # masked accuracy that is no prediction but a leak
SPREAD = "validation/feature_spread"
MAX_WAIT = 0.2  # of the time, spent waiting for batches
MIN_OF_REPORTED = 0.5  # of the masked accuracy that others report, below which a run is looked at
NEARLY = 0.9  # of the steps, after which a model should have learnt more than to copy,
MUCH_LESS = 0.8  # of the accuracy of copying, below which it certainly has not


class Reported(NamedTuple):
    """A run of others, on the 960 hours of LibriSpeech; one of other audio differs."""

    recipe: dict[str, Any]  # its fields, as `recipe` has them
    points: tuple[tuple[int, float, float], ...]  # step, masked loss in nats, masked accuracy
    source: str
    others: str = ""  # what else is known


# fairseq logs its loss in bits: times ln 2. Fine-tuned, this user's model had more errors than the
# paper's.
REPORTED = (
    Reported(
        {"kind": "mfcc", "width": 768, "num_layers": 12, "num_codes": 100},
        ((250_000, 2.307, 0.365), (400_000, 2.179, 0.390)),
        "one user's base with fairseq on 6 GPUs: facebookresearch/fairseq, issue 4907",
        "; ESPnet's had 0.44 at step 150000 (espnet/espnet, issue 3814) and 0.46 after 250 epochs"
        " (pull request 4747)",
    ),
    Reported(
        {"kind": "layer", "width": 768, "num_layers": 12, "num_codes": 500},
        ((250_000, 2.573, 0.383), (400_000, 2.372, 0.417)),
        "one user's base with fairseq on 8 GPUs: facebookresearch/fairseq, issue 4907",
    ),
)


MODEL = ("kind", "width", "num_layers", "num_codes")  # of a recipe: all but its schedule


def stored() -> list[dict[str, Any]]:
    text = importlib.resources.files("hubert_jax.doctor").joinpath("curves.json").read_text()
    return json.loads(text)


def recipe(config) -> dict[str, Any]:
    """The fields of a config that decide a curve, as curves.json has them."""
    return {
        "kind": config.features.kind, "width": config.model.width,
        "num_layers": config.model.num_layers, "batch_seconds": config.batch.seconds,
        "num_steps": config.train.num_steps, "num_codes": config.kmeans.num_codes,
        "peak_lr": config.optim.peak_lr,
    }  # fmt: skip


def expected(config, guesses: Guesses | None) -> Finding:
    """What the loss and the accuracy of a run to come should be.

    `guesses` are what needs no model (labels.guesses), None where there are no labels yet.
    """
    start = math.log(config.kmeans.num_codes)
    words = f"masked loss from ln K = {start:.2f} down"
    ours, theirs = _ours(config), _theirs(config)
    if ours is not None:
        step, loss, accuracy = ours["points"][-1]
        words += f" to {loss:.2f}, masked accuracy up to {accuracy:.2f} at step {step} (our run of"
        words += f" this recipe, {ours['name']})"
    elif theirs is not None:
        points = [f"{loss:.2f} and {x:.3f} at step {step}" for step, loss, x in theirs.points]
        words += "; there is no run of ours of this recipe; masked loss and accuracy of"
        words += f" {', '.join(points)} are reported ({theirs.source}{theirs.others})"
    else:
        words += "; there is no run of this recipe, ours or reported"
        if near := _near(config):
            step, loss, accuracy = near["points"][-1]
            words += (
                f"; the same model on another schedule had {loss:.2f} and {accuracy:.3f} at step"
            )
            words += f" {step} ({near['name']})"
        for base in REPORTED:
            if all(base.recipe[field] == recipe(config)[field] for field in ("kind", "num_codes")):
                words += f"; base had an accuracy of {base.points[-1][2]:.3f} with as many codes of"
                words += f" the same kind ({base.source})"
    if guesses is not None:
        words += "; copying the nearest visible code gives an accuracy of"
        words += f" {guesses.copying:.3f} on these labels, and a model should end above that"
    return ok(f"curve {config.iteration}: expected", words)


def _ours(config) -> dict[str, Any] | None:
    return next((curve for curve in stored() if curve["recipe"] == recipe(config)), None)


def _near(config) -> dict[str, Any] | None:
    """Our run of the same model for the same kind of labels, on another schedule."""
    found = recipe(config)
    return next(
        (x for x in stored() if all(x["recipe"][field] == found[field] for field in MODEL)), None
    )


def _theirs(config) -> Reported | None:
    found = recipe(config).items()
    return next((reported for reported in REPORTED if reported.recipe.items() <= found), None)


def of_metrics(
    config, lines: Sequence[Mapping[str, float]], num_codes: int, guesses: Guesses | None
) -> list[Finding]:
    """Findings of the metrics of one iteration's training, as far as it is; `guesses` as above."""
    title = f"curve {config.iteration}"
    rows = [line for line in lines if "train/masked_loss" in line]
    if not rows:
        return [ok(title, "no step reported yet")]
    whole = [row for row in rows if math.isfinite(row["train/masked_loss"])]
    found = [_skipped(title, rows, config.train.report_every)]
    if not whole:
        return found
    last, warm = whole[-1], config.optim.warmup_steps
    step, loss = int(last["step"]), last["train/masked_loss"]
    accuracy = last["train/masked_accuracy"]
    lowest = min(row["train/masked_loss"] for row in whole)
    first = whole[0]["train/masked_loss"]
    found += [
        graded(
            f"{title}: start",
            f"masked loss {first:.2f} at step {whole[0]['step']:.0f}, ln K ="
            f" {math.log(num_codes):.2f}",
            "head.temperature or head.code_init are unusual, or peak_lr far too high",
            is_look=first > MAX_START * math.log(num_codes),
        ),
        graded(
            f"{title}: rise",
            f"masked loss {loss:.2f} at step {step}, its lowest was {lowest:.2f}",
            "go back to a checkpoint from before the rise and lower optim.peak_lr",
            is_look=loss > (1 + RISE) * lowest,
        ),
        graded(
            f"{title}: accuracy",
            f"{accuracy:.3f} of the masked frames",
            "nobody predicts speech so well: labels that follow the audio's start or a constant"
            " tone? Listen to it, and look at the labels",
            is_look=accuracy > TOO_GOOD,
        ),
        *_beside_guesses(config, last, guesses),
        graded(
            f"{title}: one code",
            f"perplexity of predictions {last['train/predicted_perplexity']:.1f}, of labels"
            f" {last['train/label_perplexity']:.1f}",
            "past the warm-up, the model knows no more than which code is frequent: lower"
            " optim.peak_lr; do the labels belong to the audio?",
            is_look=step > warm
            and last["train/predicted_perplexity"]
            <= watch.ONE_CODE
            < last["train/label_perplexity"] / 2,
        ),
        *_features(title, lines, warm),
        _waiting(title, whole[1:] or whole, config.train.report_every),
        _beside(title, config, last, num_codes),
    ]
    return found


def _beside_guesses(config, last: Mapping[str, float], guesses: Guesses | None) -> list[Finding]:
    if guesses is None:
        return []
    title, step = f"curve {config.iteration}", int(last["step"])
    accuracy, loss = last["train/masked_accuracy"], last["train/masked_loss"]
    return [
        graded(
            f"{title}: copying",
            f"{accuracy:.3f} of the masked frames at step {step}; copying the nearest visible code"
            f" gives {guesses.copying:.3f}",
            "nearly at its end it has learnt no more than that codes last a while: too few steps,"
            " or optim.peak_lr too low or too high; do the labels belong to the audio?",
            is_look=step >= NEARLY * config.train.num_steps
            and accuracy < MUCH_LESS * guesses.copying,
        ),
        graded(
            f"{title}: frequencies",
            f"masked loss {loss:.2f}; to know how frequent codes are and nothing else gives"
            f" {guesses.entropy:.2f}",
            "past the warm-up it has learnt less than that: lower or raise optim.peak_lr; do the"
            " labels belong to the audio?",
            is_look=step > 2 * config.optim.warmup_steps and loss > guesses.entropy,
        ),
    ]


def _skipped(title: str, rows: Sequence[Mapping[str, float]], every: int) -> Finding:
    share = sum(row.get("train/skipped", 0.0) for row in rows) / len(rows)
    count = round(share * rows[-1]["step"])
    return graded(
        f"{title}: skipped",
        f"{count} steps had a loss or gradient that is not finite",
        "the log names their utterances: leave those out, or lower optim.peak_lr",
        is_look=share > 0 or not math.isfinite(rows[-1]["train/masked_loss"]),
    )


def _features(title: str, lines: Sequence[Mapping[str, float]], warm: int) -> list[Finding]:
    """Of the newest validation past the warm-up; older runs did not measure it."""
    spreads = [line[SPREAD] for line in lines if SPREAD in line and line["step"] > warm]
    return [
        graded(
            f"{title}: features",
            f"{spread:.1%} of their size differs from frame to frame",
            "they have collapsed: go back to an earlier checkpoint and lower optim.peak_lr",
            is_look=spread <= watch.SAME_FEATURES,
        )
        for spread in spreads[-1:]
    ]


def _waiting(title: str, rows: Sequence[Mapping[str, float]], every: int) -> Finding:
    waited = sum(row.get("train/seconds_waited_for_data", 0.0) for row in rows)
    rate = [row["train/audio_seconds_per_second"] for row in rows]
    audio = [row["train/audio_seconds"] for row in rows]
    steps = [b["step"] - a["step"] for a, b in itertools.pairwise(rows)]
    lasted = sum(n * a / r for n, a, r in zip([every, *steps], audio, rate, strict=False) if r > 0)
    share = waited / max(lasted, 1e-9)
    return graded(
        f"{title}: waiting",
        f"{share:.0%} of the time is spent waiting for audio",
        "raise batch.num_workers and batch.read_ahead, or put the corpus on a faster disk",
        is_look=share > MAX_WAIT,
    )


def _beside(title: str, config, last: Mapping[str, float], num_codes: int) -> Finding:
    what, remedy = f"{title}: beside others", "is it other audio? Else see the findings above"
    step, loss = int(last["step"]), last["train/masked_loss"]
    accuracy = last["train/masked_accuracy"]
    ours, theirs = _ours(config), _theirs(config)
    curve = ours or (None if theirs else _near(config))
    if curve is not None and step > curve["points"][-1][0]:
        return ok(
            what, f"at step {step}; ours ends at step {curve['points'][-1][0]} ({curve['name']})"
        )
    if ours is not None:
        want = at(ours["points"], step)
        words = f"masked loss {loss:.2f} at step {step}, ours had {want:.2f} ({ours['name']})"
        is_look = loss - want > TOLERANCE * math.log(num_codes)
        return graded(f"{title}: beside ours", words, remedy, is_look=is_look)
    if curve is not None:
        had = at(curve["points"], step)
        words = f"masked loss {loss:.2f} at step {step}; the same model on another schedule had"
        return ok(what, f"{words} {had:.2f} ({curve['name']})")
    if theirs is None:
        return ok(what, "there is no run of this recipe, ours or reported")
    passed = [point for point in theirs.points if point[0] <= step]
    at_step, wanted_loss, wanted = passed[-1] if passed else theirs.points[0]
    return graded(
        what,
        f"masked loss {loss:.2f} and accuracy {accuracy:.3f} at step {step}; reported at step"
        f" {at_step} are {wanted_loss:.2f} and {wanted:.3f} ({theirs.source})",
        remedy,
        is_look=bool(passed) and accuracy < MIN_OF_REPORTED * wanted,
    )


def at(points: Sequence[Sequence[float]], step: int) -> float:
    """The loss of a curve at `step`, between its points in a straight line."""
    before = after = points[0]
    for point in points:
        before, after = after, point
        if point[0] >= step:
            break
    if step >= after[0] or after[0] == before[0]:
        return after[1]
    share = max(0.0, (step - before[0]) / (after[0] - before[0]))
    return before[1] + share * (after[1] - before[1])
