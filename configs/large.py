# SPDX-License-Identifier: Apache-2.0
"""HuBERT large: one iteration on 60,000 hours of Libri-light (Hsu et al., 2021, arXiv 2106.07447).

| iteration | labels | K | batch | peak lr | steps |
|---|---|---|---|---|---|
| it1 | layer 9 of base it2 | 500 | 7200 s (128 x 56.25) | 1.5e-3 | 400k |

    hubert run --config=configs/large.py --workdir=work/large --config.teacher=CHECKPOINTS

reads Libri-light's folders in data/librilight (flac); CHECKPOINTS are those of base's it2.
On few devices a batch is worked off in parts: --config.train.accumulate=16 on eight GPUs of 80 GB.

Expected time, from counting operations: a step is 860 TFLOP, so at 420 TFLOP/s, which one H200
does with rows of 15.6 s (docs/PERFORMANCE.md), 400k steps take 9.5 days on one GPU; on eight 28
hours and on 128 1.8 hours, neither measured. Scores of this stack: none measured yet.
"""

from ml_collections import ConfigDict


def get_config(iteration: str = "it1") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.iteration = iteration
    config.iterations = ("it1", "units")

    # Another run's checkpoints: run configs/base.py, or give --config.teacher=FOLDER.
    config.teacher = "work/base/it2/checkpoints"

    config.corpus = dict(
        train="folder:data/librilight/large,folder:data/librilight/medium,"
        "folder:data/librilight/small",
        validation="librispeech:data/dev-clean.tar.gz,librispeech:data/dev-other.tar.gz",
        test="",  # audio with phone times, only to be scored
        validation_share=0.05,  # of the speakers, where validation is empty
        exclude="",  # ids with this regular expression in them are left out
        speaker_pattern="",  # the first group in an id; empty: the folder
        min_seconds=0.5,
        max_seconds=30.0,  # longer recordings are cut where they are quiet
        max_rejected=0.01,  # share of files that may be unusable
        num_workers=32,
        num_shards=4096,
        synth=dict(),
    )

    config.features = dict(
        kind="layer",
        checkpoint="",  # the teacher
        layer=9,
        sample_share=0.005,  # of the training utterances, for k-means
        dtype="float16",
        batch_seconds=1200.0,
        num_shards=256,
        dump=False,
    )

    config.kmeans = dict(
        num_codes=500,
        seed_rows=65_536,
        num_restarts=8,
        seed_passes=5,
        batch_rows=16_384,
        max_passes=5,
        patience=100,
        lloyd_passes=10,
        lloyd_tolerance=1e-4,
    )

    config.labels = dict(num_shards=1024)

    config.model = dict(
        conv_width=512,
        conv_norm="layer",
        conv_bias=False,
        width=1024,
        ffn_width=4096,
        num_heads=16,
        num_layers=24,
        pre_norm=True,
        position_kernel=128,
        position_groups=16,
        input_dropout=0.0,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        layer_drop=0.0,
        gradient_scale=1.0,
        mask_prob=0.8,
        mask_length=10,
        normalize_audio=True,
        compute_dtype="auto",
        unroll="auto",
        remat="none",
    )

    config.head = dict(
        code_width=768,
        temperature=0.1,
        untied=False,
        code_init="uniform",
    )

    config.loss = dict(
        penalty=10.0,
        unmasked_weight_start=0.0,
        unmasked_weight_end=0.0,
    )

    config.batch = dict(
        seconds=7200.0,
        min_seconds=2.0,
        max_seconds=15.625,
        num_rungs=8,
        rungs=(),  # fitted to the corpus
        row_multiple=64,
        num_workers=8,
        num_threads=8,
        read_ahead=8,
    )

    config.optim = dict(
        peak_lr=1.5e-3,
        warmup_steps=32_000,
        beta1=0.9,
        beta2=0.98,
        eps=1e-6,
        weight_decay=0.01,
        clip_norm=1.0,
    )

    config.mesh = dict(data=-1, fsdp=1, tensor=1)

    config.train = dict(
        num_steps=400_000,
        labels=(iteration,),
        start_from="",
        start_head="kept",
        accumulate=1,
        report_every=100,
        validate_every=5_000,
    )

    config.checkpoints = dict(
        every=5_000,
        keep_last=3,
        keep_every=50_000,
    )

    if iteration == "it1":
        config.features.checkpoint = config.get_ref("teacher")
    if iteration == "units":
        # Three quarters of the depth, as layer 9 of base; not tuned.
        config.features.update(checkpoint="it1", layer=18)
        config.train.num_steps = 0

    return config
