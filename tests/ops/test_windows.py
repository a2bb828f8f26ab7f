# SPDX-License-Identifier: Apache-2.0
"""Windows cover a recording once joined, whatever its length and the blocks it came in."""

import numpy as np
import pytest

from hubert_jax.ops import frames, windows

LONGEST = frames.num_samples(windows.WINDOW)
STRIDE = (windows.WINDOW - windows.OVERLAP) * frames.HOP


def windows_of(num_samples, block=100_000):
    wave_S = np.arange(num_samples, dtype=np.float32)
    return wave_S, list(windows.cut(wave_S[i : i + block] for i in range(0, num_samples, block)))


@pytest.mark.parametrize(
    "num_samples",
    [400, 719, 16_000, LONGEST, LONGEST + 319, LONGEST + 320, LONGEST + STRIDE]
    + [LONGEST + STRIDE + 320, LONGEST + 2 * STRIDE - 1, 1_500_000],
)
def test_windows_cover_the_recording_and_join_to_it(num_samples):
    wave_S, cut = windows_of(num_samples)
    num_frames = frames.num_frames(num_samples)
    assert [window.is_last for window in cut] == [False] * (len(cut) - 1) + [True]
    join, joined = windows.Join(), []
    for window in cut:
        start = window.first_frame * frames.HOP
        np.testing.assert_array_equal(window.wave_S, wave_S[start : start + len(window.wave_S)])
        in_window = frames.num_frames(len(window.wave_S))
        assert in_window == min(num_frames, windows.WINDOW)
        assert len(window.wave_S) == (num_samples if len(cut) == 1 else LONGEST)
        # Features that name their frame join to features that name their frame.
        names_TD = window.first_frame + np.arange(in_window, dtype=np.float32)[:, None]
        joined.append(join.add(window, names_TD))
    np.testing.assert_allclose(np.concatenate(joined)[:, 0], np.arange(num_frames), rtol=1e-6)
    further = max(0, num_frames - windows.WINDOW)
    assert len(cut) == 1 + -(-further // (windows.WINDOW - windows.OVERLAP))


def test_blocks_do_not_matter():
    _, some = windows_of(1_200_000, block=1_200_000)
    for block in (999, 480_000, 480_080):
        _, same = windows_of(1_200_000, block=block)
        assert [w.first_frame for w in some] == [w.first_frame for w in same] == [0, 1250, 2249]
        for a, b in zip(some, same, strict=True):
            np.testing.assert_array_equal(a.wave_S, b.wave_S)


def test_cross_fade_is_linear_and_one_window_is_untouched():
    _, (first, last) = windows_of(LONGEST + STRIDE)
    join = windows.Join()
    assert len(join.add(first, np.zeros((windows.WINDOW, 1), np.float32))) == 0
    faded_T = join.add(last, np.ones((windows.WINDOW, 1), np.float32))[:, 0]
    inside = slice(windows.WINDOW - windows.OVERLAP, windows.WINDOW)
    np.testing.assert_array_equal(faded_T[: inside.start], 0)
    np.testing.assert_array_equal(faded_T[inside.stop :], 1)
    np.testing.assert_allclose(np.diff(faded_T[inside]), 1 / windows.OVERLAP, atol=1e-6)

    _, (only,) = windows_of(50_000)
    features_TD = np.random.default_rng(0).normal(size=(155, 3)).astype(np.float32)
    np.testing.assert_array_equal(windows.Join().add(only, features_TD), features_TD)


def test_less_than_a_frame_has_no_window():
    assert windows_of(399)[1] == []
    assert windows_of(0)[1] == []
