# SPDX-License-Identifier: Apache-2.0
"""What a run will do: steps, epochs, batches, what is cropped away, memory and devices."""

import math
from typing import NamedTuple

import numpy as np

from hubert_jax.data import batches
from hubert_jax.doctor.findings import Finding, graded, ok, stop
from hubert_jax.ops import frames

# Seconds of a batch over all devices and peak learning rate: HuBERT's table of models, by width.
PAPER = {768: (32 * 87.5, 5e-4), 1024: (128 * 56.25, 1.5e-3), 1280: (256 * 22.5, 3e-3)}
MAX_DROPPED = 0.1  # of the utterances, too short to be seen at all
MAX_CROPPED = 0.75  # of the audio of an epoch
MAX_EPOCHS = 2_000  # base's second iteration sees LibriSpeech some 320 times
MAX_WARMUP = 0.5  # of the steps
MAX_LR = 5e-3


class Machine(NamedTuple):
    num_devices: int  # over all processes
    batch_ways: int  # parts that the rows of a batch are split into
    kind: str
    memory: int  # bytes of one device; 0: not known


class Size(NamedTuple):
    """What a model takes."""

    parameters: int
    activations: int  # bytes for a batch, about; without rematerialisation


def of_plan(config, num_samples_N: np.ndarray, machine: Machine) -> list[Finding]:
    """Steps, epochs and batches of one iteration's training."""
    title, train = f"plan {config.iteration}", config.train
    row_multiple = train.accumulate * machine.batch_ways
    if config.batch.row_multiple % row_multiple:
        return [
            stop(
                f"{title}: rows",
                f"batch.row_multiple is {config.batch.row_multiple}; {machine.batch_ways} ways x"
                f" {train.accumulate} parts need a multiple of {row_multiple}",
                f"start with --config.batch.row_multiple={row_multiple}, or use fewer devices",
            )
        ]
    try:
        plan = batches.Plan(
            num_samples_N, batches.BatchConfig(**config.batch),
            seed=config.seed, row_multiple=row_multiple,
        )  # fmt: skip
    except ValueError as error:
        return [stop(f"{title}: batches", str(error), "mend the section batch")]
    epochs = train.num_steps / plan.batches_per_epoch
    dropped = plan.num_dropped / len(num_samples_N)
    rungs = ", ".join(f"{plan.rows(r)} x {r / frames.SAMPLE_RATE:.2f} s" for r in plan.rungs)
    return [
        graded(
            f"{title}: epochs",
            f"{train.num_steps} steps, {plan.batches_per_epoch} batches an epoch: {epochs:.1f}"
            " epochs",
            "less than one leaves audio unseen, very many learn it by heart: set train.num_steps or"
            " batch.seconds",
            is_look=not 1 <= epochs <= MAX_EPOCHS,
        ),
        ok(f"{title}: batches", rungs),
        graded(
            f"{title}: too short",
            f"{plan.num_dropped} of {len(num_samples_N)} utterances are shorter than"
            f" batch.min_seconds={config.batch.min_seconds} and never seen",
            "lower batch.min_seconds",
            is_look=dropped > MAX_DROPPED,
        ),
        graded(
            f"{title}: cropped",
            f"{plan.share_left_out:.0%} of the audio of an epoch is cropped away",
            "raise batch.max_seconds or batch.num_rungs",
            is_look=plan.share_left_out > MAX_CROPPED,
        ),
        *of_optimiser(config),
    ]


def of_optimiser(config) -> list[Finding]:
    title, warmup, steps = (
        f"plan {config.iteration}",
        config.optim.warmup_steps,
        config.train.num_steps,
    )
    lr, seconds = config.optim.peak_lr, config.batch.seconds
    found = [
        graded(
            f"{title}: warm-up",
            f"{warmup} of {steps} steps",
            f"set optim.warmup_steps to about {max(steps // 12, 1)}",
            is_look=warmup > MAX_WARMUP * steps,
            is_stop=not 0 < warmup < steps,
        ),
        graded(
            f"{title}: checkpoints",
            f"every {config.checkpoints.every} of {steps} steps",
            "a machine that dies takes all steps since the last one with it: lower"
            " checkpoints.every",
            is_look=config.checkpoints.every > max(steps / 2, 1),
        ),
    ]
    if config.model.width in PAPER:
        want_seconds, want_lr = PAPER[config.model.width]
        words = (
            f"{seconds:.0f} s a batch at {lr:.1g}, the paper {want_seconds:.0f} s at {want_lr:.1g}"
        )
        is_hot = lr / want_lr > 2 * math.sqrt(seconds / want_seconds)
        remedy = "a smaller batch wants a lower optim.peak_lr, or accumulate with larger batches"
    else:
        words = f"{seconds:.0f} s a batch at {lr:.1g}; no size of the paper's"
        is_hot, remedy = lr > MAX_LR, "so high, training rarely holds: lower optim.peak_lr"
    return [*found, graded(f"{title}: batch and rate", words, remedy, is_look=is_hot)]


def size_of(config, num_parameters: int) -> Size:
    """About what is kept for the gradient: convolutions, widths and attention of all layers."""
    model, samples = config.model, config.batch.seconds * frames.SAMPLE_RATE
    num_bytes = 2 if model.compute_dtype == "bfloat16" else 4
    conv = sum(
        3 * samples / math.prod(stride for _, stride in frames.CONV_LAYERS[: n + 1])
        for n in range(len(frames.CONV_LAYERS))
    )
    longest = min(config.batch.max_seconds, config.batch.seconds) * frames.FRAME_RATE
    per_frame = 14 * model.width + 3 * model.ffn_width + 3 * model.num_heads * longest
    kept = conv * model.conv_width + model.num_layers * per_frame * samples / frames.HOP
    return Size(num_parameters, int(kept * num_bytes / config.train.accumulate))


def of_memory(config, size: Size, machine: Machine) -> Finding:
    what = f"plan {config.iteration}: memory"
    ways = config.mesh.fsdp * config.mesh.tensor if config.mesh.fsdp > 0 else machine.num_devices
    weights = 16 * size.parameters / max(ways, 1)  # weights, gradient and two moments, float32
    kept = size.activations / max(machine.batch_ways, 1)
    words = (
        f"{size.parameters / 1e6:.1f} M parameters: {weights / 1e9:.2f} GB with gradient and"
        f" moments, about {kept / 1e9:.2f} GB of activations"
    )
    if not machine.memory:
        return ok(what, f"{words}; the device does not tell what it has")
    return graded(
        what,
        f"{words}; a device has {machine.memory / 1e9:.1f} GB",
        "raise train.accumulate or set model.remat for activations, mesh.fsdp for weights",
        is_look=weights + kept > 0.9 * machine.memory and config.model.remat == "none",
        is_stop=weights > machine.memory,
    )
