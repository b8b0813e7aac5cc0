"""Keras' attention layers with flash_attention, against Keras' own."""

import contextlib
import inspect
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "jax")
pytest.importorskip("keras", reason="keras is not installed")

import keras

import jax_native_flash_attn.adapters.keras as adapter
from jax_native_flash_attn.adapters.keras import GroupedQueryAttention, MultiHeadAttention, use_flash_attention
from tests.adapters.comparison import assert_close, compiled
from tests.support.environment import lenient_promotion
from tests.support.grids import thinned

B, T, S, FEATURES = 2, 9, 7, 12
OURS = {"MultiHeadAttention": MultiHeadAttention, "GroupQueryAttention": GroupedQueryAttention}
SIZES: dict[str, Any] = {
    "MultiHeadAttention": {"num_heads": 4, "key_dim": 5},
    "GroupQueryAttention": {"head_dim": 5, "num_query_heads": 4, "num_key_value_heads": 2},
}


@pytest.fixture(autouse=True)
def keras_promotion():
    """Keras mixes ranks and dtypes in its own layers."""
    with lenient_promotion():
        yield


def array(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


QUERY, VALUE = array(0, B, T, FEATURES), array(1, B, S, FEATURES)
PADDING = {"query_mask": np.arange(T) < np.array([[T], [5]]), "value_mask": np.arange(S) < np.array([[4], [S]])}
HOLES = array(2, B, T, S) > -0.3
HOLES[0, 3] = False  # a row without keys
# Keras before 3.15 has no windows.
WINDOW = (
    {"sliding_window": 3} if "sliding_window" in inspect.signature(keras.layers.MultiHeadAttention).parameters else {}
)
ALL = {**PADDING, "attention_mask": HOLES.astype(np.int32), "use_causal_mask": True}


def layers(name: str, **options: Any) -> tuple[Any, Any]:
    """Keras' own, and ours with its weights."""
    theirs = getattr(keras.layers, name)(**SIZES[name], **options)
    ours = OURS[name].from_config(theirs.get_config())
    for layer in theirs, ours:
        layer.build(QUERY.shape, VALUE.shape)
        for i, variable in enumerate(layer.trainable_variables):
            variable.assign(0.3 * array(3 + i, *variable.shape))
    return theirs, ours


def results(layer: Any, **call: Any) -> Any:
    """Output, and gradients of weights and inputs."""
    call = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in call.items()}
    state = [x.value for x in layer.non_trainable_variables]

    def loss(weights: Any, query: Any, value: Any) -> Any:
        out, _ = layer.stateless_call(weights, state, query, value, **call)
        return (out**2).sum(), out

    weights = [x.value for x in layer.trainable_variables]
    gradients, out = compiled(jax.grad(loss, (0, 1, 2), has_aux=True))(weights, QUERY, VALUE)
    return out, gradients


@pytest.mark.parametrize(
    ("name", "options", "call"),
    thinned(
        [
            ("GroupQueryAttention", WINDOW, ALL),
            ("MultiHeadAttention", {"dropout": 0.4, "value_dim": 3}, {**PADDING, "training": False}),
            ("GroupQueryAttention", {"dropout": 0.4}, {**ALL, "training": True}),
        ],
        2,
    ),
    ids=["all masks", "evaluation", "dropout"],
)
def test_same_as_own(name: str, options: dict[str, Any], call: dict[str, Any]):
    theirs, ours = layers(name, seed=5, **options)
    assert_close(results(ours, **call), results(theirs, **call))


@pytest.mark.parametrize(
    ("axes", "mask", "call"),
    thinned(
        [
            (None, (4, 3, 4, 3), {}),
            ((2,), (2, 4, 1, 3, 3), {}),
            ((-2,), (3, 3), {}),
            ((1,), None, {"use_causal_mask": True}),
            ((2, 1), (2, 1, 3, 4, 3, 4), {"training": True}),
        ],
        2,
    ),
    ids=str,
)
def test_several_axes(axes: tuple[int, ...] | None, mask: tuple[int, ...] | None, call: dict[str, Any]):
    """Of inputs (2, 4, 3, FEATURES)."""
    x = array(0, 2, 4, 3, FEATURES)
    options = {"attention_axes": axes, "dropout": 0.3 if call else 0.0, "value_dim": 3, "seed": 5}
    theirs = keras.layers.MultiHeadAttention(**SIZES["MultiHeadAttention"], **options)
    ours = MultiHeadAttention.from_config(theirs.get_config())
    for layer in theirs, ours:
        layer.build(x.shape, x.shape)
        for i, variable in enumerate(layer.trainable_variables):
            variable.assign(0.3 * array(3 + i, *variable.shape))
    allowed = None if mask is None else array(1, *mask) > -0.5
    if allowed is not None:
        allowed.reshape(-1, mask[-1] * (mask[-2] if axes is None or len(axes) > 1 else 1))[0] = False  # one row
    theirs, ours = (layer(x, x, attention_mask=allowed, **call) for layer in (theirs, ours))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What attention is asked for; zeros come out."""
    calls: list[dict[str, Any]] = []

    def record(query: Any, key: Any, value: Any, **options: Any) -> Any:
        calls.append(options | {"heads": (query.shape[2], key.shape[2], value.shape[2])})
        return jnp.zeros((*query.shape[:-1], value.shape[-1]))

    monkeypatch.setattr(adapter, "flash_attention", record)
    return calls


def test_masks_that_are_no_arrays(calls: list[dict[str, Any]]):
    layer = GroupedQueryAttention(**SIZES["GroupQueryAttention"], **WINDOW)
    layer(QUERY, VALUE, use_causal_mask=True)
    layer(QUERY, VALUE, **PADDING)
    causal, padded = calls
    assert causal["mask"] is None
    assert causal["is_causal"]
    assert causal["local_window_size"] == ((2, 2) if WINDOW else None)
    assert padded["mask"] is None
    np.testing.assert_array_equal(padded["query_segment_ids"], np.where(PADDING["query_mask"], 0, -1))
    np.testing.assert_array_equal(padded["key_value_segment_ids"], np.where(PADDING["value_mask"], 0, -1))
    assert causal["heads"] == (4, 2, 2)


@pytest.mark.parametrize("name", OURS)
def test_scores_are_kerass(name: str, calls: list[dict[str, Any]]):
    theirs, ours = layers(name)
    call = {**ALL, "return_attention_scores": True}
    jax.tree.map(np.testing.assert_array_equal, ours(QUERY, VALUE, **call), theirs(QUERY, VALUE, **call))
    ours(QUERY, VALUE)
    assert len(calls) == 1


@pytest.mark.parametrize("raises", [False, True])
def test_layers_inside_the_block(raises: bool, calls: list[dict[str, Any]]):
    class Doubled(keras.layers.MultiHeadAttention):  # pyright: ignore
        def _compute_attention(self, query: Any, *arguments: Any, **options: Any) -> Any:
            return super()._compute_attention(2 * query, *arguments, **options)

    models = [layers(name)[0] for name in OURS]
    own = Doubled(**SIZES["MultiHeadAttention"])
    before = [layer(QUERY, VALUE, use_causal_mask=True) for layer in [*models, own]]
    with contextlib.suppress(ZeroDivisionError), use_flash_attention():
        for layer in models:
            layer(QUERY, VALUE, use_causal_mask=True, **PADDING)
        own(QUERY, VALUE, use_causal_mask=True)
        if raises:
            raise ZeroDivisionError
    assert [call["is_causal"] for call in calls] == [True, True, False]
    # A method of one's own gets, and hands on, an array.
    np.testing.assert_array_equal(calls[2]["mask"], np.tril(np.ones((1, 1, T, S), bool)))
    after = [layer(QUERY, VALUE, use_causal_mask=True) for layer in [*models, own]]
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert len(calls) == 3


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras' variables
@pytest.mark.parametrize("name", OURS)
def test_saved_and_loaded(name: str, tmp_path: Path):
    models = []
    for layer in layers(name):
        inputs = keras.Input((T, FEATURES))
        models.append(keras.Model(inputs, layer(inputs, inputs)))
    theirs, ours = models
    theirs.save_weights(tmp_path / "a.weights.h5")
    ours.layers[1].trainable_variables[0].assign(0 * ours.layers[1].trainable_variables[0].value)
    ours.load_weights(tmp_path / "a.weights.h5")
    ours.save(tmp_path / "a.keras")
    again = keras.models.load_model(tmp_path / "a.keras")
    assert type(again.layers[1]) is OURS[name]
    weights = ([x.value for x in model.trainable_variables] for model in (again, theirs))
    jax.tree.map(np.testing.assert_array_equal, *weights)


def test_refusals():
    for layer_class, name in (MultiHeadAttention, "MultiHeadAttention"), (GroupedQueryAttention, "GroupQueryAttention"):
        with pytest.raises(
            ValueError, match="flash_attention chooses among Keras' own kernels and must be None, got Tr"
        ):
            layer_class(**SIZES[name], flash_attention=True)
