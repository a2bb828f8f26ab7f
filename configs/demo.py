# SPDX-License-Identifier: Apache-2.0
"""The whole loop in minutes on a laptop's CPU: an hour of synthetic speech, two iterations.

    make demo
    hubert run --config=configs/demo.py --workdir=work/demo

The corpus is made on the spot and has exact phone times, so every set of labels is scored on voices
that training has not heard. The same K everywhere, so that rows can be compared. Departures from
base, each because a few minutes are not enough otherwise: unmasked frames are predicted too, with a
weight that falls to 0; masks are shorter (4 frames instead of 10) and hide fewer frames; code
embeddings start from a normal distribution; penalty x 1; no dropout.
"""

from ml_collections import ConfigDict


def get_config(iteration: str = "it1") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.iteration = iteration
    config.iterations = ("it1", "it2", "units")

    config.corpus = dict(
        train="synth",
        validation="",
        test="",
        validation_share=0.05,  # of the speakers, where validation is empty
        exclude="",  # ids with this regular expression in them are left out
        speaker_pattern="",  # the first group in an id; empty: the folder
        min_seconds=0.5,
        max_seconds=30.0,
        max_rejected=0.01,
        num_workers=2,
        num_shards=4,
        synth=dict(
            train_minutes=60.0,
            validation_minutes=5.0,
            train_voices=32,
            validation_voices=7,
            accents=("en", "en-US", "en-GB-scotland", "en-GB-x-rp"),
            words_per_minute=(150.0, 200.0),
            min_seconds=2.2,
            max_seconds=8.0,
            reverberation_seconds=(0.1, 0.3),
            direct_to_reverberant_db=(5.0, 15.0),
            snr_db=(10.0, 30.0),
            level_db=(-32.0, -20.0),
            seed=0,
        ),
    )

    config.features = dict(
        kind="mfcc",
        checkpoint="",
        layer=0,
        sample_share=1.0,  # of the training utterances, for k-means
        dtype="float32",
        batch_seconds=60.0,
        num_shards=4,
        dump=False,
    )

    config.kmeans = dict(
        num_codes=100,
        seed_rows=30_000,
        num_restarts=4,
        seed_passes=3,
        batch_rows=10_000,
        max_passes=20,
        patience=100,
        lloyd_passes=10,
        lloyd_tolerance=1e-4,
    )

    config.labels = dict(num_shards=4)

    config.model = dict(
        conv_width=64,
        conv_norm="group",
        conv_bias=False,
        width=128,
        ffn_width=512,
        num_heads=4,
        num_layers=3,
        pre_norm=True,
        position_kernel=32,
        position_groups=4,
        input_dropout=0.0,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        layer_drop=0.0,
        gradient_scale=1.0,
        mask_prob=0.5,
        mask_length=4,
        normalize_audio=False,
        compute_dtype="auto",
        unroll="auto",
        remat="none",
    )

    config.head = dict(
        code_width=64,
        temperature=0.1,
        untied=False,
        code_init="normal",
    )

    config.loss = dict(
        penalty=1.0,
        unmasked_weight_start=1.0,
        unmasked_weight_end=0.0,
    )

    config.batch = dict(
        seconds=8.1,  # 4 rows of 2 s
        min_seconds=2.0,
        max_seconds=2.0,
        num_rungs=1,
        rungs=(),  # fitted to the corpus
        row_multiple=4,
        num_workers=0,
        num_threads=1,
        read_ahead=8,
    )

    config.optim = dict(
        peak_lr=1.5e-3,
        warmup_steps=160,
        beta1=0.9,
        beta2=0.98,
        eps=1e-6,
        weight_decay=0.01,
        clip_norm=10.0,
    )

    config.mesh = dict(data=-1, fsdp=1, tensor=1)

    config.train = dict(
        num_steps=2_000,
        labels=(iteration,),
        start_from="",
        start_head="kept",
        accumulate=1,
        report_every=100,
        validate_every=1_000,
    )

    config.checkpoints = dict(
        every=1_000,
        keep_last=1,
        keep_every=0,
    )

    if iteration == "it2":
        config.features.update(kind="layer", checkpoint="it1", layer=2, dtype="float16")
        config.train.num_steps = 3_200  # 1.6 times as long, as base trains
    if iteration == "units":
        config.features.update(kind="layer", checkpoint="it2", layer=2, dtype="float16")
        config.train.num_steps = 0

    return config
