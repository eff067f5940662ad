# SPDX-License-Identifier: BSD-3-Clause
"""fastrnn.keras against Keras's own layers: results, gradients, masks, states, files and whole models."""

import importlib.util
import json
import os
import sys

os.environ["KERAS_BACKEND"] = "torch"

import numpy as np
import pytest
import torch

keras = pytest.importorskip("keras", reason="needs Keras 3: pip install fastrnn[test]")
from tolerances import assert_close_to_truth  # noqa: E402

import fastrnn.keras as fast  # noqa: E402

B, T, I, H = 4, 6, 3, 5  # noqa: E741
KINDS = {
    "SimpleRNN": {},
    "SimpleRNN relu": {"activation": "relu"},
    "LSTM": {},
    "GRU": {},
    "GRU before": {"reset_after": False},
}
MASKS = {
    "tail": [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]],
    "any": [[0, 1, 1, 0, 0, 1], [1, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]],
    "none at all": np.zeros((B, T)),
}


@pytest.fixture(autouse=True)
def start(monkeypatch):
    """The same numbers for every test; and an oracle in float64: Keras's product computes that in float32 on torch."""
    keras.utils.set_random_seed(0)
    as_tensor = keras.ops.convert_to_tensor
    monkeypatch.setattr(keras.src.ops, "matmul", lambda a, b: as_tensor(a) @ as_tensor(b))


@pytest.fixture
def only_kernels(monkeypatch):
    """Keras's loop shall not run: not even once."""
    monkeypatch.setattr(fast, "_KERAS_LOOPS", {})


def make(kind, library, **options):
    return getattr(library, kind.split()[0])(H, **{"dtype": "float64", "seed": 3} | KINDS[kind] | options)


def pair(kind, **options):
    """A layer of Keras and one of ours, with the same weights; biases are not zero."""
    layers = [make(kind, library, **options) for library in (keras.layers, fast)]
    for layer in layers:
        layer.build((B, T, I))
    weights = [np.random.default_rng(k).normal(0, 0.5, w.shape) for k, w in enumerate(layers[0].get_weights())]
    for layer in layers:
        layer.set_weights(weights)
    return layers


def run(layer, input, states=(), **arguments):
    """Results of a call, and the gradients of input, initial states and weights."""
    leaves = [torch.tensor(t, requires_grad=True) for t in (input, *states)]
    initial = {"initial_state": leaves[1:]} if states else {}
    results = layer(leaves[0], **initial, **arguments)
    results = results if isinstance(results, tuple) else (results,)
    leaves += [weight.value for weight in layer.trainable_weights]
    loss = sum((result * torch.arange(1.0, 1 + result.numel()).reshape(result.shape).cos()).sum() for result in results)
    return results, torch.autograd.grad(loss, leaves, allow_unused=True)


def assert_same(layers, *arguments, **options):
    theirs, ours = (run(layer, *arguments, **options) for layer in layers)
    for expected, value in zip(theirs, ours, strict=True):
        assert len(value) == len(expected)
        for e, v in zip(expected, value, strict=True):
            # Keras's loop leaves out what has no influence; the kernels say zero.
            torch.testing.assert_close(v, torch.zeros_like(v) if e is None and v is not None else e)


def draw(*shape):
    return np.random.default_rng(1).normal(size=shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("mask", [None, *MASKS])
@pytest.mark.parametrize("zeros", [False, True])
def test_results_and_gradients(kind, backwards, sequences, mask, zeros, only_kernels):
    layers = pair(
        kind, go_backwards=backwards, return_sequences=sequences, return_state=True, zero_output_for_mask=zeros
    )
    options = {} if mask is None else {"mask": torch.tensor(np.array(MASKS[mask]), dtype=torch.bool)}
    states = [draw(B, H) for _ in layers[0].state_size]
    assert_same(layers, draw(B, T, I), **options)
    assert_same(layers, draw(B, T, I), states, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"use_bias": False}, {"unroll": True}, {"implementation": 1}], ids=str)
def test_options(kind, options, only_kernels):
    if "SimpleRNN" in kind:
        options = {key: value for key, value in options.items() if key != "implementation"}
    assert_same(pair(kind, return_sequences=True, **options), draw(B, T, I))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_draws_the_masks_of_keras(kind, only_kernels):
    input, mask = draw(B, T, I), torch.tensor(np.array(MASKS["any"]), dtype=torch.bool)
    results = [run(layer, input, training=True, mask=mask)[0][0] for layer in pair(kind, dropout=0.4)]
    torch.testing.assert_close(*results)
    for training in (True, False):
        assert_same(pair(kind, dropout=0.4, return_sequences=True), input, training=training)
    assert not torch.allclose(results[0], run(pair(kind)[0], input, mask=mask)[0][0])


@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_dropout(kind):
    mask = torch.tensor(np.array(MASKS["any"]), dtype=torch.bool)
    for training in (True, False):
        options = {"dropout": 0.2, "recurrent_dropout": 0.4, "return_sequences": True}
        assert_same(pair(kind, **options), draw(B, T, I), training=training, mask=mask)
    explanation = str(fast.explain(pair(kind, recurrent_dropout=0.4)[1]))
    if "SimpleRNN" in kind:  # one mask for its one gate
        assert explanation.endswith("the kernels")
    else:
        assert "recurrent_dropout with a mask of its own for each gate" in explanation


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sequences", [False, True])
def test_stateful(kind, sequences, only_kernels):
    layers = pair(kind, stateful=True, return_sequences=sequences, return_state=True, go_backwards=True)
    if kind != "SimpleRNN":  # without it Keras's layer overwrites, on torch, states that its backward needs
        layers[0].use_cudnn = False
    for part in draw(3, B, T, I):
        assert_same(layers, part)  # states are carried over, and gradients are those of the states as they were
    for layer in layers:
        layer.reset_state()
    assert_same(layers, draw(B, T, I))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("merge", ["concat", "sum", None])
@pytest.mark.parametrize("mask", [None, "any"])
def test_bidirectional(kind, merge, mask, only_kernels):
    layers = [
        keras.layers.Bidirectional(
            make(kind, library, return_sequences=merge != "sum", return_state=True), merge_mode=merge, dtype="float64"
        )
        for library in (keras.layers, fast)
    ]
    options = {} if mask is None else {"mask": torch.tensor(np.array(MASKS[mask]), dtype=torch.bool)}
    for layer in layers:
        layer.build((B, T, I))
    layers[1].set_weights(layers[0].get_weights())
    assert type(layers[1].backward_layer) is getattr(fast, kind.split()[0])
    assert_same(layers, draw(B, T, I), **options)
    states = [draw(B, H) for _ in range(2 * (1 + (kind == "LSTM")))]
    assert_same(layers, draw(B, T, I), states, **options)


@pytest.mark.parametrize("name", ["SimpleRNN", "LSTM", "GRU"])
@pytest.mark.parametrize(
    "options",
    [{"activation": "elu"}, {"activation": None}, {"recurrent_activation": "hard_sigmoid"}],
    ids=str,
)
def test_what_the_kernels_do_not_serve_runs_keras_loop_and_says_so(name, options):
    if name == "SimpleRNN" and "recurrent_activation" in options:
        options = {"activation": "sigmoid"}
    layers = pair(name, return_sequences=True, **options)
    assert_same(layers, draw(B, T, I))
    (option, value), *_ = options.items()
    explanation = str(fast.explain(layers[1]))
    assert f"Keras's own loop: there is no kernel for {option}={value or 'linear'}" in explanation


def test_explain_a_model():
    class OwnCell(keras.layers.LSTMCell):
        pass

    own = fast.LSTM(H, name="d")
    own.cell = OwnCell(H)
    layers = [
        keras.layers.Bidirectional(fast.GRU(H, name="a", return_sequences=True)),
        keras.layers.LSTM(H, name="b", return_sequences=True),
        keras.Sequential([fast.LSTM(H, name="c", recurrent_dropout=0.5, return_sequences=True)]),
        own,
        keras.layers.RNN(keras.layers.GRUCell(H), name="e"),
    ]
    lines = dict(line.split(" ", 1) for line in fast.explain(keras.Sequential(layers)).layers)
    assert list(sorted(lines)) == ["b", "backward_a", "c", "d", "e", "forward_a"]
    assert lines["forward_a"] == lines["backward_a"] == "(GRU): the kernels"
    assert lines["b"] == "(LSTM): Keras's own loop: fastrnn.keras.patch() puts it on the kernels"
    assert lines["c"].startswith("(LSTM): the kernels; Keras's own loop in training: there is no kernel for rec")
    assert lines["d"] == "(LSTM): Keras's own loop: there is no kernel for OwnCell"
    assert lines["e"] == "(RNN): Keras's own loop: the kernels serve SimpleRNN, LSTM and GRU"
    with pytest.raises(TypeError, match="expected model to be a Keras model or layer, got Linear"):
        fast.explain(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind, policy, only_kernels):
    options = {"return_sequences": True, "return_state": True, "recurrent_initializer": "glorot_uniform"}
    layers, truth = pair(kind, dtype=policy, **options), pair(kind, **options)[0]
    truth.set_weights(layers[0].get_weights())
    input = torch.tensor(draw(B, T, I)).to(getattr(torch, layers[0].compute_dtype))
    results = [
        layer(input.to(dtype)) for layer, dtype in zip([*layers, truth], [None, None, torch.float64], strict=True)
    ]
    for theirs, ours, expected in zip(*results, strict=True):
        assert_close_to_truth(kind, ours, theirs, expected, terms=(I + H) * T)


# ---------------------------------------------------------------------------------------------------------------------
# Models


def program(layers, name):
    """As it stands in textbooks; the library of the recurrent layer is all that differs."""
    model = keras.Sequential([keras.Input((10, 1)), getattr(layers, name)(64), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    series = np.sin(np.arange(110) / 5)
    x = np.stack([series[k : k + 10] for k in range(100)])[..., None]
    history = model.fit(x, series[10:], epochs=3, shuffle=False, verbose=0)
    return history.history["loss"], model.predict(x, verbose=0)


@pytest.mark.parametrize("name", ["SimpleRNN", "LSTM", "GRU"])
def test_a_program_trains_as_with_keras(name, only_kernels, monkeypatch):
    runs = []
    for layers in (fast, keras.layers):
        keras.utils.set_random_seed(0)
        runs.append(program(layers, name))
    (loss, prediction), (expected_loss, expected) = runs
    assert loss == pytest.approx(expected_loss, rel=1e-4) and loss[-1] < 0.9 * loss[0]
    np.testing.assert_allclose(prediction, expected, atol=1e-4)


def translator(layers):
    """Embedding with masks, encoder and decoder: states and masks go through the functional interface."""
    source, begun = keras.Input((None,), dtype="int32"), keras.Input((None,), dtype="int32")
    encoder = keras.layers.Bidirectional(layers.LSTM(H, return_state=True, name="encoder"))
    _, fh, fc, bh, bc = encoder(keras.layers.Embedding(9, I, mask_zero=True)(source))
    states = [keras.layers.Concatenate()([fh, bh]), keras.layers.Concatenate()([fc, bc])]
    x = keras.layers.Embedding(9, I, mask_zero=True)(begun)
    x = layers.LSTM(2 * H, return_sequences=True, name="decoder")(x, initial_state=states)
    return keras.Model([source, begun], keras.layers.Dense(9)(x))


def words():
    rng = np.random.default_rng(5)
    return [rng.integers(0, 9, (16, 7)), rng.integers(0, 9, (16, 5))], rng.integers(0, 9, (16, 5))


def fitted(model):
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = words()
    loss = model.fit(x, y, epochs=2, batch_size=4, shuffle=False, verbose=0).history["loss"]
    return loss, model.predict(x, verbose=0)


def test_an_encoder_and_a_decoder_with_masks(only_kernels, monkeypatch):
    ours, theirs = translator(fast), translator(keras.layers)
    ours.set_weights(theirs.get_weights())
    (loss, prediction) = fitted(ours)
    monkeypatch.undo()
    expected_loss, expected = fitted(theirs)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    np.testing.assert_allclose(prediction, expected, rtol=1e-4, atol=1e-5)


def test_files_go_both_ways(tmp_path, monkeypatch):
    ours, (x, _) = translator(fast), words()
    ours.save(tmp_path / "ours.keras")
    ours.save_weights(tmp_path / "ours.weights.h5")
    expected = ours.predict(x, verbose=0)

    loaded = keras.saving.load_model(tmp_path / "ours.keras")
    assert type(loaded.get_layer("decoder")) is fast.LSTM
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), expected)
    theirs = translator(keras.layers)
    theirs.load_weights(tmp_path / "ours.weights.h5")
    np.testing.assert_allclose(theirs.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-6)

    # where fastrnn is not there
    monkeypatch.delitem(keras.saving.get_custom_objects(), "fastrnn>LSTM")
    plain = {"fastrnn>LSTM": keras.layers.LSTM}
    loaded = keras.saving.load_model(tmp_path / "ours.keras", custom_objects=plain)
    assert type(loaded.get_layer("decoder")) is keras.layers.LSTM
    theirs.save_weights(tmp_path / "theirs.weights.h5")
    ours.load_weights(tmp_path / "theirs.weights.h5")
    np.testing.assert_array_equal(ours.predict(x, verbose=0), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_configurations(kind):
    theirs, ours = pair(kind, go_backwards=True, dropout=0.1, name="layer")
    assert isinstance(ours, type(theirs)) and ours.get_config() == theirs.get_config()
    copy = type(ours).from_config(ours.get_config())
    assert type(copy) is type(ours) and copy.get_config() == ours.get_config()
    again = keras.saving.deserialize_keras_object(json.loads(json.dumps(keras.saving.serialize_keras_object(ours))))
    assert type(again) is type(ours) and again.get_config() == ours.get_config()
    assert [w.path.rpartition("/")[2] for w in ours.weights] == [w.path.rpartition("/")[2] for w in theirs.weights]


def test_patch_serves_models_that_exist(tmp_path, monkeypatch):
    model, (x, _) = translator(keras.layers), words()
    expected = model.predict(x, verbose=0)
    loops = {kind: keras.layers.__dict__[kind].inner_loop for kind in ("SimpleRNN", "LSTM", "GRU")}
    with monkeypatch.context() as only_kernels:
        only_kernels.setattr(fast, "_KERAS_LOOPS", {})
        with fast.patch():
            assert fast.explain(model).layers[-1].endswith("the kernels")
            np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-6)
            model.save(tmp_path / "model.keras")
            with fast.patch():
                model.predict(x, verbose=0)
            assert fast.explain(model).layers[-1].endswith("the kernels")
    assert {kind: getattr(keras.layers, kind).inner_loop for kind in loops} == loops
    assert "Keras's own loop" in str(fast.explain(model))
    assert type(keras.saving.load_model(tmp_path / "model.keras").get_layer("decoder")) is keras.layers.LSTM

    switch = fast.patch()  # without `with` it lasts
    try:
        assert "Keras's own loop" not in str(fast.explain(translator(keras.layers)))
        assert_same([keras.layers.GRU(H, activation="elu", dtype="float64")] * 2, draw(B, T, I))
    finally:
        switch.close()
    assert keras.layers.GRU.inner_loop is loops["GRU"]


@pytest.mark.extended
@pytest.mark.parametrize("name", ["SimpleRNN", "LSTM", "GRU"])
def test_compiled_models(name, only_kernels):
    layer = pair(name, dtype="float32")[1]
    model = keras.Sequential([keras.Input((T, I)), keras.layers.Masking(), layer, keras.layers.Dense(1)])
    x, y, begin = draw(B, T, I) * np.array(MASKS["any"])[..., None], draw(B, 1), model.get_weights()
    losses = []
    for jit in (False, True):
        keras.utils.set_random_seed(0)
        model.set_weights(begin)
        model.compile("sgd", "mse", jit_compile=jit)
        losses.append(model.fit(x, y, epochs=2, verbose=0).history["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("kind", ["LSTM", "GRU before"])
def test_keras_exports_to_onnx(kind, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install fastrnn[adoption]")
    pytest.importorskip("onnxscript", reason="needs onnxscript: pip install fastrnn[adoption]")
    layer = pair(kind, dtype="float32")[1]
    model = keras.Sequential([keras.Input((T, I)), layer, keras.layers.Dense(1)])
    x = draw(B, T, I).astype("float32")
    expected = model.predict(x, verbose=0)
    model.export(tmp_path / "model.onnx", format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (result,) = session.run(None, {session.get_inputs()[0].name: x})
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


def fresh_import():
    spec = importlib.util.spec_from_file_location("fresh", fast.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_patches_may_overlap():
    first, second = fast.patch(), fast.patch()
    first.close()
    assert keras.layers.LSTM.inner_loop is fast._inner_loop
    second.close()
    assert keras.layers.LSTM.inner_loop is fast._KERAS_LOOPS["LSTM"]


def test_another_backend_is_an_error(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(
        ImportError, match="needs Keras's torch backend, and Keras runs on jax: set KERAS_BACKEND=torch"
    ):
        fresh_import()


def test_keras_that_does_not_import_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(ImportError, match="pip install keras, and set KERAS_BACKEND=torch"):
        fresh_import()
