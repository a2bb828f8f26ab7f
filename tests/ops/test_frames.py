# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of frames against the convolutions themselves, at every length at once.

A row per length S: samples that exist are 1, those beyond are NaN. With kernels of ones a frame is
finite exactly if its receptive field lies within the S samples.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hubert_jax.ops import frames

LONGEST = 1_800


def run_convs(audio_BS) -> list[np.ndarray]:
    """Outputs of the seven convolutions, (B, T) each."""
    outputs, x_B1S = [], jnp.asarray(audio_BS, jnp.float32)[:, None]
    for kernel, stride in frames.CONV_LAYERS:
        weight = jnp.ones((1, 1, kernel))
        x_B1S = jax.lax.conv_general_dilated(x_B1S, weight, (stride,), "VALID")
        outputs.append(np.asarray(x_B1S[:, 0]))
    return outputs


def test_number_of_frames_at_every_length():
    lengths = np.arange(10, LONGEST + 1)
    exists = np.arange(LONGEST) < lengths[:, None]
    outputs = run_convs(np.where(exists, 1.0, np.nan))
    counts = np.isfinite(outputs[-1]).sum(axis=1)
    assert counts.max() == 5 and (counts[lengths < 400] == 0).all()
    np.testing.assert_array_equal(frames.num_frames(lengths), counts)
    assert [frames.num_frames(int(length)) for length in lengths] == counts.tolist()
    for ours, output in zip(frames.conv_lengths(lengths), outputs, strict=True):
        np.testing.assert_array_equal(ours.clip(0), np.isfinite(output).sum(axis=1))
    assert outputs[-1].shape[1] == frames.num_frames(LONGEST)


def test_which_samples_a_frame_sees():
    poisoned = np.where(np.eye(LONGEST, dtype=bool), np.nan, 1.0)  # row s: sample s is NaN
    seen_ST = np.isnan(run_convs(poisoned)[-1])
    starts_T = np.arange(seen_ST.shape[1]) * frames.HOP
    samples_S = np.arange(LONGEST)[:, None]
    inside_ST = (samples_S >= starts_T) & (samples_S < starts_T + frames.RECEPTIVE_FIELD)
    np.testing.assert_array_equal(seen_ST, inside_ST)


def test_constants_have_the_published_values():
    assert (frames.HOP, frames.RECEPTIVE_FIELD, frames.FRAME_RATE) == (320, 400, 50)
    assert frames.num_frames(250_000) == 781 and frames.num_frames(16_000, hop=160) == 98


def test_num_samples_is_the_shortest_audio_with_so_many_frames():
    for num_frames in (1, 2, 50, 781):
        num_samples = frames.num_samples(num_frames)
        assert frames.num_frames(num_samples) == num_frames
        assert frames.num_frames(num_samples - 1) == num_frames - 1


@pytest.mark.parametrize("label_rate", [50, 100])
def test_labels_of_a_crop_are_those_of_the_whole(label_rate):
    hop = frames.SAMPLE_RATE // label_rate
    whole = frames.label_positions(60, first_frame=0, label_rate=label_rate)
    for first_frame in (0, 1, 7, 20):
        crop = frames.label_positions(40, first_frame=first_frame, label_rate=label_rate)
        np.testing.assert_array_equal(crop, whole[first_frame : first_frame + 40])
    # The label's window starts where the frame's does: same length, same centre.
    np.testing.assert_array_equal(whole * hop, np.arange(60) * frames.HOP)
    # Audio with so many frames has the last label too.
    num_labels = frames.num_frames(frames.num_samples(60), hop=hop)
    assert whole[-1] < num_labels
