# SPDX-License-Identifier: Apache-2.0
"""Phone and word times: formats, rates, cutting and packing."""

import numpy as np
import pytest

from hubert_jax.data import alignments
from hubert_jax.data.utterance import Intervals

LONG_TEXTGRID = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 1.5
tiers? <exists>
size = 3
item []:
    item [1]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 1.5
        intervals: size = 2
        intervals [1]:
            xmin = 0
            xmax = 0.5
            text = ""
        intervals [2]:
            xmin = 0.5
            xmax = 1.5
            text = "say ""1.5"" [2]"
    item [2]:
        class = "TextTier"
        name = "phones of another kind"
        xmin = 0
        xmax = 1.5
        points: size = 1
        points [1]:
            number = 0.25
            mark = "x"
    item [3]:
        class = "IntervalTier"
        name = "speaker 1 - phones"
        xmin = 0
        xmax = 1.5
        intervals: size = 3
        intervals [1]:
            xmin = 0
            xmax = 0.5
            text = ""
        intervals [2]:
            xmin = 0.5
            xmax = 0.75
            text = "S"
        intervals [3]:
            xmin = 0.75
            xmax = 1.5
            text = "EY1"
"""
SHORT_TEXTGRID = """"ooTextFile"
"TextGrid"
0
1.5
<exists>
3
"IntervalTier"
"words"
0
1.5
2
0
0.5
""
0.5
1.5
"say ""1.5"" [2]"
"TextTier"
"phones of another kind"
0
1.5
1
0.25
"x"
"IntervalTier"
"speaker 1 - phones"
0
1.5
3
0
0.5
""
0.5
0.75
"S"
0.75
1.5
"EY1"
"""


def rows(intervals):
    return list(
        zip(intervals.starts.tolist(), intervals.stops.tolist(), intervals.names, strict=True)
    )


def parse(texts, *, sample_rate=16_000):
    texts = {suffix: text.encode() for suffix, text in texts.items()}
    return alignments.parse(texts, name="utterance", sample_rate=sample_rate)


def test_timit_times_are_in_samples_of_the_file():
    text = "0 1600 h#\n1600 2400 sh\n\n2400 3200 ix\n"
    at_16k = parse({".phn": text, ".wrd": "1600 3200 she\n"})
    assert rows(at_16k.phones) == [(0, 1600, "h#"), (1600, 2400, "sh"), (2400, 3200, "ix")]
    assert rows(at_16k.words) == [(1600, 3200, "she")]
    at_8k = parse({".phn": text}, sample_rate=8_000)
    assert rows(at_8k.phones) == [(0, 3200, "h#"), (3200, 4800, "sh"), (4800, 6400, "ix")]
    assert at_8k.words is None


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("text", [LONG_TEXTGRID, SHORT_TEXTGRID])
def test_both_forms_of_a_textgrid(text, encoding):
    aligned = alignments.parse({".textgrid": text.encode(encoding)}, name="u", sample_rate=8_000)
    assert rows(aligned.phones) == [(0, 8000, "sil"), (8000, 12000, "S"), (12000, 24000, "EY1")]
    assert rows(aligned.words) == [(8000, 24000, 'say "1.5" [2]')]


def test_ctm_of_one_recording_or_of_several():
    one = "anything 1 0.10 0.05 AH0 0.9\nanything 1 0.15 0.10 B\n"
    assert rows(parse({".ctm": one}).phones) == [(1600, 2400, "AH0"), (2400, 4000, "B")]
    several = ";; a comment\nother 1 0.0 1.0 X\nutterance 1 0.5 0.25 Y\n"
    aligned = parse({".ctm": several, ".words.ctm": one})
    assert rows(aligned.phones) == [(8000, 12000, "Y")]
    assert aligned.words.names == ("AH0", "B")


@pytest.mark.parametrize(
    ("suffix", "text", "message"),
    [
        (".phn", "0 100 a\n100 b\n", "line 2"),
        (".ctm", "u 1 x 0.5 a\n", "line 1"),
        (".ctm", "a 1 0 1 x\nb 1 0 1 x\n", "2 recordings, none of them 'utterance'"),
        (".textgrid", "something else", "ends early"),
        (".textgrid", SHORT_TEXTGRID[: len(SHORT_TEXTGRID) // 2], "ends early"),
        (".textgrid", SHORT_TEXTGRID.replace('"S"', "5"), "should have a string"),
    ],
)
def test_broken_files_are_named(suffix, text, message):
    with pytest.raises(ValueError, match=f"utterance{suffix}: .*{message}"):
        parse({suffix: text})


def test_times_of_other_audio_are_noticed():
    times = parse({".phn": "0 8000 a\n8000 16000 b\n"}).phones
    alignments.check(times, 15_000)  # an aligner's rounding
    with pytest.raises(ValueError, match=r"up to 1.00 s for 0.50 s of audio; .* rate"):
        alignments.check(times, 8_000)
    with pytest.raises(ValueError, match="backwards"):
        alignments.check(parse({".phn": "8000 16000 a\n0 8000 b\n"}).phones, 16_000)


def test_pieces_of_times_join_to_the_whole():
    times = parse({".phn": "0 1000 a\n1000 2500 b\n2500 2600 c\n2700 4000 d\n"}).phones
    first, second = alignments.clip(times, 0, 2000), alignments.clip(times, 2000, 4000)
    assert rows(first) == [(0, 1000, "a"), (1000, 2000, "b")]
    assert rows(second) == [(0, 500, "b"), (500, 600, "c"), (700, 2000, "d")]


def intervals(*triples):
    starts, stops, names = zip(*triples, strict=True)
    return Intervals(np.array(starts), np.array(stops), names)


def test_packed_times_come_back_alone_and_merged():
    one = [intervals((0, 5, "b"), (5, 9, "a")), None, intervals((1, 2, "b"))]
    two = [None, intervals((3, 4, "z"), (4, 8, "b"))]
    packed = [alignments.Packed(alignments.pack(part)) for part in (one, two, [None], [])]
    merged = alignments.Packed(alignments.merge(packed))
    assert len(merged) == 6 and merged.num_aligned == 3
    assert merged.names == ["a", "b", "z"]
    for n, want in enumerate(one + two + [None]):
        got = merged[n]
        assert (got is None) == (want is None)
        if want is not None:
            assert rows(got) == rows(want)
