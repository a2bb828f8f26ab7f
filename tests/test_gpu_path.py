# SPDX-License-Identifier: Apache-2.0
"""The model as NVIDIA's GPUs compute it, its kernels interpreted on the CPU, is the model.

B batch, S samples, T frames
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hubert_jax import optim, pretraining, train
from hubert_jax.ops import frames
from tests import test_sharding, tiny
from tests.cuda import lowered

# As narrow as the kernels take it, and with everything that is dropped.
WIDTHS = {
    "conv_width": 128, "width": 64, "ffn_width": 128, "num_layers": 2, "unroll": "yes",
    "dropout": 0.1, "attention_dropout": 0.1, "input_dropout": 0.1,
}  # fmt: skip
LOSS = pretraining.LossConfig(penalty=10.0, unmasked_weight_start=1.0, unmasked_weight_end=0.0)
NUM_SAMPLES = 7_000  # frames of 1399, which is odd, down to 21


def config(kind: str, dtype: str):
    return dataclasses.replace(tiny.KINDS[kind], **WIDTHS, compute_dtype=dtype)


def loss_and_gradients(kind: str, dtype: str):
    model = tiny.model(config(kind, dtype))
    num_frames = frames.num_frames(NUM_SAMPLES)
    batch = {
        "audio": 0.3 + jax.random.normal(jax.random.key(1), (2, NUM_SAMPLES)),
        "labels": jax.random.randint(jax.random.key(2), (2, num_frames, 1), 0, 12),
        "weights": jnp.ones(2),
    }

    @jax.jit
    def run(model):
        def total(model):
            value = pretraining.loss(model, batch, jax.random.key(3), 5, config=LOSS, num_steps=10)
            return value.total / value.weight

        return jax.value_and_grad(total)(model)

    loss, grads = run(model)
    return float(loss), {jax.tree_util.keystr(k): g for k, g in jax.tree.leaves_with_path(grads)}


def error(got, want) -> float:
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_step_is_about_as_far_from_float32_as_without_kernels(kind, request):
    """The same masks and dropout in all three; the order of sums and what is rounded differ."""
    want_loss, want = loss_and_gradients(kind, "float32")
    plain_loss, plain = loss_and_gradients(kind, "bfloat16")
    request.getfixturevalue("hopper")
    names = request.getfixturevalue("interpreted")
    loss, grads = loss_and_gradients(kind, "bfloat16")
    used = {"mix", "key_gradients", "query_gradients", "conv", "conv_input", "conv_kernel"}
    used |= {"normalise", "norm_gradients", "gelu_of_sum", "gelu_gradient", "gelu_and_slope"}
    assert names == used
    assert loss != plain_loss
    assert abs(loss - want_loss) <= abs(plain_loss - want_loss) + 1e-3 * want_loss
    whole = [error(*map(flat, pair)) for pair in ((grads, want), (plain, want))]
    assert whole[0] <= 1.3 * whole[1]  # 1.14 for large: XLA on a CPU rounds less of the other
    assert whole[1] < 0.05


def flat(grads):
    return jnp.concatenate([grads[name].ravel() for name in sorted(grads)])


def test_features_of_padded_rows_too(request):
    """And there are as many frames as on a CPU, whatever the convolutions were padded to."""
    lengths = jnp.array([NUM_SAMPLES, 5_000])
    wave_BS = jax.random.normal(jax.random.key(1), (2, NUM_SAMPLES))
    wave_BS *= jnp.arange(NUM_SAMPLES) < lengths[:, None]

    def features(dtype: str):
        encoder = tiny.model(config("base", dtype)).encoder
        run = functools.partial(tiny.features, layer=2, num_samples_B=lengths)
        return run(encoder, wave_BS)

    want_BTD, plain_BTD = features("float32"), features("bfloat16")
    request.getfixturevalue("hopper")
    request.getfixturevalue("interpreted")
    jax.clear_caches()
    got_BTD = features("bfloat16")
    assert got_BTD.shape == want_BTD.shape
    assert (got_BTD != plain_BTD).any()
    for row, num_frames in enumerate(frames.num_frames(np.asarray(lengths))):
        got, plain, want = (x[row, :num_frames] for x in (got_BTD, plain_BTD, want_BTD))
        assert error(got, want) <= 1.3 * error(plain, want)
    jax.clear_caches()


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 2, 1)])
def test_on_a_mesh_each_device_runs_the_kernels_on_its_rows(sizes, hopper, checked_kernels):
    """With all checks of what varies over devices; of 8 rows, each has `share`."""
    mesh = sizes, ("data", "fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 3
    model = jax.eval_shape(lambda: tiny.model(config("base", "bfloat16")))
    share = 8 // (sizes[0] * sizes[1])

    def total(model, audio_BS):
        mask_BT = jnp.zeros((8, frames.num_frames(NUM_SAMPLES)), bool)
        logits, penalty = model(audio_BS, mask_BT, key=jax.random.key(3))
        return jnp.sum(logits[0].astype(jnp.float32)) + penalty

    audio_BS = jax.ShapeDtypeStruct((8, NUM_SAMPLES), jnp.float32)
    text = lowered(jax.grad(total), model, audio_BS, mesh=mesh)
    calls = re.findall(r"xla\.gpu\.triton\(.*: \((.*)\) -> ", text)
    assert len(calls) == len(checked_kernels) > 30  # those of a layer once
    aligned = frames.conv_lengths(5 * (1408 + 1))  # 1399 frames at first, up to a multiple of 16
    lengths = [*aligned, frames.num_frames(NUM_SAMPLES)]
    firsts = {int(re.search(r"tensor<(\d+)x(?:\d+x)+bf16>", operands)[1]) for operands in calls}
    assert firsts <= {share} | {share * length for length in lengths}


@pytest.mark.parametrize(
    "options", [{"unroll": "no", "remat": "dots"}, {"layer_drop": 0.3}, {"remat": "layer"}], ids=str
)
def test_scanned_dropped_or_made_again_the_layers_are_the_same(options, request):
    """Kernels within a scan, a cond and jax.checkpoint."""
    plain = dataclasses.replace(config("base", "bfloat16"), **options | {"remat": "none"})
    other = dataclasses.replace(config("base", "bfloat16"), **options)
    request.getfixturevalue("hopper")
    names = request.getfixturevalue("interpreted")
    x_BTD = jax.random.normal(jax.random.key(1), (2, 21, 64), jnp.bfloat16)

    def gradients(config):
        encoder = tiny.model(config).encoder

        @jax.jit
        def run(encoder, x_BTD):
            def total(encoder, x_BTD):
                y_BTD = encoder._run_layers(x_BTD, None, None, jax.random.key(2))
                return jnp.sum(jnp.sin(y_BTD.astype(jnp.float32)))

            return jax.grad(total, argnums=(0, 1))(encoder, x_BTD)

        grads, grad_BTD = run(encoder, x_BTD)
        return jnp.concatenate([g.ravel() for g in jax.tree.leaves(grads.layers)]), grad_BTD

    looped = dataclasses.replace(plain, unroll="yes")
    for a, b in zip(gradients(other), gradients(looped), strict=True):
        assert error(a.astype(jnp.float32), b.astype(jnp.float32)) < 0.02
    assert {"mix", "normalise", "norm_gradients", "gelu_of_sum", "gelu_gradient"} <= names


def test_xla_knows_the_options_that_a_step_is_compiled_with_on_gpus(hopper):
    """They are XLA's, whatever it compiles for; of others it knows nothing."""
    model = tiny.model()
    optimizer = optim.adamw(test_sharding.OPTIM, num_steps=10)
    loss = functools.partial(pretraining.loss, config=LOSS, num_steps=10)
    step = train.make_step(loss, optimizer, accumulate=1)
    state = train.init_state(model, optimizer)
    assert int(step(state, test_sharding.batch(), jax.random.key(0))[0].step) == 1
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_enable_triton_gems"):
        jax.jit(jnp.sin, compiler_options={"xla_gpu_enable_triton_gems": False})(1.0)
