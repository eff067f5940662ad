# SPDX-License-Identifier: BSD-3-Clause
"""Gradient flow and saturation, against a loop of `fastrnn.reference`'s cells and plain autograd."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import linear, mse_loss
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from fastrnn import diagnostics, reference
from fastrnn.diagnostics import gradient_flow, saturation

T, B, I, H = 6, 4, 3, 5  # noqa: E741
LENGTHS = [6, 4, 4, 1]
KINDS = {
    "LSTM": ({}, reference.lstm_cell),
    "GRU": ({}, reference.gru_cell),
    "RNN": ({}, reference.rnn_cell),
    "RNN_RELU": ({"nonlinearity": "relu"}, partial(reference.rnn_cell, nonlinearity="relu")),
}


def make(kind, library=fastrnn, **options):
    return getattr(library, kind.removesuffix("_RELU"))(I, H, **KINDS[kind][0], **options).double()


def steps_of(input):
    return input.data.split(input.batch_sizes.tolist()) if isinstance(input, PackedSequence) else input.unbind()


def unrolled(kind, module, input):
    """As the definition says: the outputs by step, and for each layer and direction the gates' input, h_prev and h."""
    cell, directions = KINDS[kind][1], 1 + module.bidirectional
    steps, runs = list(steps_of(input)), {}
    for run, (w_ih, w_hh, *rest) in enumerate(module.all_weights):
        layer, direction = divmod(run, directions)
        (b_ih, b_hh), w_hr = (rest[:2] if module.bias else (None, None)), rest[2 * module.bias :]
        h, c = torch.zeros(B, w_hh.size(1)).double(), torch.zeros(B, H).double()
        seen = []
        for x in reversed(steps) if direction else steps:
            n = len(x)
            gates = linear(x, w_ih, b_ih), linear(h[:n], w_hh, b_hh)
            (new, *new_c), _ = cell(*gates, (h[:n], c[:n])[: 2 if kind == "LSTM" else 1])
            new = linear(new, *w_hr) if w_hr else new
            new.retain_grad()
            seen.append((gates, new))
            h = torch.cat([new, h[n:]])
            c = torch.cat([*new_c, c[n:]]) if new_c else c
        name = f"{type(module).__name__} layer {layer}" + " reverse" * direction
        runs[name] = seen[::-1] if direction else seen
        if direction == directions - 1:
            below = list(runs.values())[-directions:]
            steps = [torch.cat([h for _, h in step], -1) for step in zip(*below, strict=True)]
    return steps, runs


@pytest.mark.parametrize("library", [fastrnn, nn])
@pytest.mark.parametrize("layout", ["dense", "batch_first", "packed"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "LSTM with a projection"])
def test_exact(kind, options, layout, library):
    if kind == "LSTM with a projection":
        kind, options = "LSTM", options | {"proj_size": 2}
    module = make(kind, library, batch_first=layout == "batch_first", **options)
    dense = torch.randn(T, B, I).double()
    input = pack_padded_sequence(dense, torch.tensor(LENGTHS)) if layout == "packed" else dense
    outputs, runs = unrolled(kind, module, input)
    weights = [torch.randn_like(output) for output in outputs]
    sum((output.sin() * weight).sum() for output, weight in zip(outputs, weights, strict=True)).backward()

    def loss(result, weights):
        output = result[0].transpose(0, 1) if module.batch_first else result[0]
        return sum((output.sin() * weight).sum() for output, weight in zip(steps_of(output), weights, strict=True))

    module.zero_grad()
    batch = (input.transpose(0, 1) if module.batch_first else input, weights)
    flow = gradient_flow(module, batch, loss)
    assert list(flow.norms) == list(runs)
    for name, seen in runs.items():
        torch.testing.assert_close(flow.norms[name], torch.stack([h.grad.norm() for _, h in seen]))
    assert all(parameter.grad is None for parameter in module.parameters())
    assert type(module) is getattr(library, kind.removesuffix("_RELU")) and "_op" not in vars(module)

    shares = saturation(module, batch, margin=0.3).shares
    assert list(shares) == list(runs)
    for name, seen in runs.items():
        (gx, gh), h = (torch.cat([gates[k] for gates, _ in seen]) for k in (0, 1)), torch.cat([h for _, h in seen])
        gx, gh = (t.unflatten(-1, (-1, H)).unbind(-2) for t in (gx, gh))
        if kind == "LSTM":
            i, f, g, o = (a + b for a, b in zip(gx, gh, strict=True))
            gates = {"i": i.sigmoid(), "f": f.sigmoid(), "g": g.tanh(), "o": o.sigmoid()}
        elif kind == "GRU":
            r, z = (gx[0] + gh[0]).sigmoid(), (gx[1] + gh[1]).sigmoid()
            gates = {"r": r, "z": z, "n": (gx[2] + r * gh[2]).tanh()}
        else:
            gates = {"h": h}
        low = {"g": -0.7, "n": -0.7, "h": 0.0 if kind == "RNN_RELU" else -0.7}
        high = {"h": float("inf")} if kind == "RNN_RELU" else {}
        for gate, value in gates.items():
            expected = [(value <= low.get(gate, 0.3)), (value >= high.get(gate, 0.7))]
            assert shares[name][gate] == tuple(share.double().mean().item() for share in expected)
        assert list(shares[name]) == list(gates)


def weighted(result, weight):
    """A loss of every output and every final state."""
    output, *states = (result[0], *(result[1] if isinstance(result[1], tuple) else [result[1]]))
    return (output.sin() * weight).sum() + sum(state.square().sum() for state in states)


MODULES = {
    "RNN": lambda **options: fastrnn.RNN(I, H, **options),
    "leaky RNN": lambda **options: fastrnn.RNN(I, H, nonlinearity="leaky_relu", **options),
    "GRU": lambda **options: fastrnn.GRU(I, H, **options),
    "GRU before": lambda **options: fastrnn.GRU(I, H, reset_after=False, **options),
    "LSTM": lambda **options: fastrnn.LSTM(I, H, **options),
    "coupled": lambda **options: fastrnn.LSTM(I, H, coupled=True, **options),
    "peephole": lambda **options: fastrnn.LSTM(I, H, peephole=True, **options),
    "SLSTM": lambda **options: fastrnn.SLSTM(I, H, **options),
}


@pytest.mark.parametrize("kind", MODULES)
def test_lengths_are_as_packed(kind):
    module = MODULES[kind](bidirectional=True).double()
    input, weight = torch.randn(T, B, I).double(), torch.randn(T, B, 2 * H).double()
    alive = torch.arange(T)[:, None] < torch.tensor(LENGTHS)
    packed_weight = weight[alive]
    packed = pack_padded_sequence(input, torch.tensor(LENGTHS))
    expected = gradient_flow(
        module, (packed, packed_weight), lambda result, w: weighted((result[0].data, result[1]), w)
    )
    order = torch.tensor([2, 0, 3, 1])
    lengths = torch.tensor(LENGTHS)[order]
    flow = gradient_flow(Call(module, lengths=lengths), (input[:, order], weight[:, order]), weighted)
    shares = saturation(Call(module, lengths=lengths), input[:, order]).shares
    expected_shares = saturation(module, packed).shares
    for name, norms in expected.norms.items():
        torch.testing.assert_close(flow.norms[name.replace(type(module).__name__, "module", 1)], norms)
        assert shares[name.replace(type(module).__name__, "module", 1)] == expected_shares[name]


class Call(nn.Module):
    """A module that is called with options."""

    def __init__(self, module, **options):
        super().__init__()
        self.module, self.options = module, options

    def forward(self, input):
        return self.module(input, **self.options)


@pytest.mark.parametrize("kind", MODULES)
def test_a_reset_begins_a_new_sequence(kind):
    module = MODULES[kind]().double()
    input, weight = torch.randn(T, B, I).double(), torch.randn(T, B, H).double()
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[4] = True
    flow = gradient_flow(Call(module, reset=reset), (input, weight), weighted)
    first = gradient_flow(module, (input[:4], weight[:4]), lambda result, w: (result[0].sin() * w).sum())
    second = gradient_flow(module, (input[4:], weight[4:]), weighted)
    name = f"{type(module).__name__} layer 0"
    expected = torch.cat([first.norms[name], second.norms[name]])
    torch.testing.assert_close(flow.norms["module layer 0"], expected)
    whole, parts = (
        saturation(Call(module, reset=reset), input).shares,
        [saturation(module, x).shares for x in (input[:4], input[4:])],
    )
    for gate, (low, high) in whole["module layer 0"].items():
        ends = [(4 * a + 2 * b) / 6 for a, b in zip(*(part[name][gate] for part in parts), strict=True)]
        assert (low, high) == pytest.approx(ends)


@pytest.mark.parametrize("kind", MODULES)
def test_recomputation_changes_nothing(kind):
    module = MODULES[kind](checkpoint=4, num_layers=2, bidirectional=True).double()
    batch = torch.randn(T, B, I).double(), torch.randn(T, B, 2 * H).double()
    flow = gradient_flow(module, batch, weighted)
    plain = MODULES[kind](num_layers=2, bidirectional=True).double()
    plain.load_state_dict(module.state_dict())
    expected = gradient_flow(plain, batch, weighted)
    assert list(flow.norms) == list(expected.norms) and module.options.checkpoint == 4
    for name, norms in expected.norms.items():
        torch.testing.assert_close(flow.norms[name], norms)


def test_a_clipped_gradient():
    rnn = fastrnn.RNN(I, H, grad_clip=0.3).double()
    input, weight = torch.randn(T, B, I).double(), torch.randn(T, B, H).double()
    h, seen = torch.zeros(B, H).double(), []
    for x in input:
        handed_on = h.clone().requires_grad_()
        handed_on.register_hook(lambda grad: grad.clamp(-0.3, 0.3))
        h = rnn_step(rnn, x, handed_on)
        h.retain_grad()
        seen.append(h)
    weighted((torch.stack(seen), h), weight).backward()
    flow = gradient_flow(rnn, (input, weight), weighted)
    torch.testing.assert_close(flow.norms["RNN layer 0"], torch.stack([h.grad.norm() for h in seen]))
    rnn.options = fastrnn.RNN(I, H).options
    assert not torch.allclose(
        gradient_flow(rnn, (input, weight), weighted).norms["RNN layer 0"], flow.norms["RNN layer 0"]
    )


def test_zoneout_and_recurrent_dropout():
    """In evaluation a unit keeps a share of what it was; in training one mask per sequence lies on h."""
    rnn = fastrnn.RNN(I, H, zoneout=0.25).double().eval()
    input, weight = torch.randn(T, B, I).double(), torch.randn(T, B, H).double()
    h, seen = torch.zeros(B, H).double(), []
    for x in input:
        h = 0.25 * h + 0.75 * rnn_step(rnn, x, h)
        h.retain_grad()
        seen.append(h)
    weighted((torch.stack(seen), h), weight).backward()
    flow = gradient_flow(rnn, (input, weight), weighted)
    torch.testing.assert_close(flow.norms["RNN layer 0"], torch.stack([h.grad.norm() for h in seen]))

    rnn = fastrnn.RNN(I, H, recurrent_dropout=0.5).double()
    torch.manual_seed(3)
    mask = torch.dropout(torch.ones(B, H).double(), 0.5, True)
    h, seen = torch.zeros(B, H).double(), []
    for x in input:
        h = rnn_step(rnn, x, h * mask)
        h.retain_grad()
        seen.append(h)
    weighted((torch.stack(seen), h), weight).backward()
    torch.manual_seed(3)
    flow = gradient_flow(rnn, (input, weight), weighted)
    torch.testing.assert_close(flow.norms["RNN layer 0"], torch.stack([h.grad.norm() for h in seen]))
    torch.manual_seed(3)
    share = saturation(rnn, input, margin=0.4).shares["RNN layer 0"]["h"]
    values = torch.cat(seen)
    assert share == ((values <= -0.6).double().mean().item(), (values >= 0.6).double().mean().item())


def rnn_step(rnn, x, h):
    return torch.tanh(linear(x, rnn.weight_ih_l0, rnn.bias_ih_l0) + linear(h, rnn.weight_hh_l0, rnn.bias_hh_l0))


@pytest.mark.parametrize("kind", [*MODULES, "GRU norm", "LSTM norm"])
def test_gates_are_those_of_the_definition(kind, monkeypatch):
    """Whatever the cells of fastrnn.reference hand out."""
    base, _, is_norm = kind.partition(" norm")
    module = MODULES[base](**({"layer_norm": True} if is_norm else {}))

    def constant(cell, *args, **options):
        states, gates = cell(*args, **options)
        return states, {gate: torch.full_like(values, 0.98) for gate, values in gates.items()}

    for name, cell in list(vars(reference).items()):
        if name.endswith("_cell"):
            monkeypatch.setattr(reference, name, partial(constant, cell))
    (shares,) = saturation(module, torch.randn(T, B, I)).shares.values()
    assert set(shares.values()) == {(0.0, 0.0 if kind == "leaky RNN" else 1.0)}


def test_gates_of_the_further_cells():
    """At one step, from states that are given, against the formulas of the classes."""
    x, h, c = torch.randn(1, B, I), torch.randn(1, B, H), torch.randn(1, B, H)

    def parts(module, count):
        gates = linear(x[0], module.weight_ih_l0, module.bias_ih_l0)
        return (gates + linear(h[0], module.weight_hh_l0, module.bias_hh_l0)).chunk(count, -1)

    coupled, peephole, before = (MODULES[kind]() for kind in ("coupled", "peephole", "GRU before"))
    f, g, o = parts(coupled, 3)
    expected = {"f": f.sigmoid(), "g": g.tanh(), "o": o.sigmoid()}
    check_gates(coupled, (x, (h, c)), expected)

    w_i, w_f, w_o = peephole.weight_peephole_l0.chunk(3)
    i, f, g, o = parts(peephole, 4)
    i, f, g = (i + w_i * c[0]).sigmoid(), (f + w_f * c[0]).sigmoid(), g.tanh()
    expected = {"i": i, "f": f, "g": g, "o": (o + w_o * (f * c[0] + i * g)).sigmoid()}
    check_gates(peephole, (x, (h, c)), expected)

    r, z, _ = (part.sigmoid() for part in parts(before, 3))
    w_ih, w_hh, b_ih, b_hh = (w.chunk(3)[2] for w in before.all_weights[0])
    expected = {"r": r, "z": z, "n": torch.tanh(linear(x[0], w_ih, b_ih) + linear(r * h[0], w_hh, b_hh))}
    check_gates(before, (x, h), expected)

    slstm = MODULES["SLSTM"]()
    _, f, z, o = parts(slstm, 4)
    check_gates(slstm, (x, (h, c, c.abs(), c)), {"f": f.sigmoid(), "z": z.tanh(), "o": o.sigmoid()})


def check_gates(module, inputs, expected):
    shares = saturation(module, (*inputs, None), margin=0.45).shares[f"{type(module).__name__} layer 0"]
    assert list(shares) == list(expected)
    for gate, values in expected.items():
        low = -0.55 if gate in "gnz" and values.min() < 0 else 0.45
        assert shares[gate] == ((values <= low).double().mean().item(), (values >= 0.55).double().mean().item())


def test_a_part_that_forbids_gradients():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.below, self.above = nn.GRU(I, H), nn.GRU(H, H)

        def forward(self, x):
            with torch.no_grad():
                x, _ = self.below(x)
            return self.above(x)

    flow = gradient_flow(Frozen(), (torch.randn(T, B, I), torch.randn(T, B, H)), weighted)
    assert (flow.norms["below layer 0"] == 0).all() and (flow.norms["above layer 0"] > 0).all()


class Decoder(nn.Module):
    """A module that is called twice, and a cell in a loop of the model's own."""

    def __init__(self, library):
        super().__init__()
        self.encoder, self.cell = library.GRU(I, H), library.LSTMCell(H, H)

    def forward(self, first, second):
        h = self.encoder(torch.cat([first, second]))[1][0]
        h = h + self.encoder(second, h[None])[1][0]
        state = (h, torch.zeros_like(h))
        for _ in range(3):
            state = self.cell(h, state)
        return state[0]


@pytest.mark.parametrize("library", [fastrnn, nn])
def test_calls_continue_one_axis_of_time(library):
    model = Decoder(library).double()
    first, second, target = torch.randn(4, B, I).double(), torch.randn(2, B, I).double(), torch.randn(B, H).double()
    flow = gradient_flow(model, (first, second, target), mse_loss)
    assert {name: len(norms) for name, norms in flow.norms.items()} == {"encoder layer 0": 8, "cell": 3}

    # At the end of each stretch the whole gradient can be had without taking steps apart.
    middle = model.encoder(first)[1]
    h = model.encoder(second, middle)[1]
    last = model.encoder(second, h)[1]
    start = h[0] + last[0]
    state, seen = (start, torch.zeros_like(start)), []
    for _ in range(3):
        state = model.cell(start, state)
        seen.append(state[0])
    grads = torch.autograd.grad(mse_loss(state[0], target), [middle, h, last, *seen])
    norms = torch.stack([grad.norm() for grad in grads])
    torch.testing.assert_close(flow.norms["encoder layer 0"][[3, 5, 7]], norms[:3])
    torch.testing.assert_close(flow.norms["cell"], norms[3:])


@pytest.mark.parametrize("name", ("RNN", "GRU", "LSTM"))
def test_a_cell_under_autocast(name):
    class Loop(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.cell, self.dtype = getattr(fastrnn, f"{name}Cell")(I, H), dtype

        def forward(self, input):
            with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
                hx = None
                for x in input:
                    hx = self.cell(x, hx)
            return (hx[0] if name == "LSTM" else hx).float()

    models = [Loop(dtype) for dtype in (torch.bfloat16, torch.float32)]
    models[1].load_state_dict(models[0].state_dict())
    arguments = (torch.randn(T, B, I), torch.randn(B, H))
    flows = [gradient_flow(model, arguments, mse_loss).norms["cell"] for model in models]
    torch.testing.assert_close(*flows, rtol=0.05, atol=0)
    assert saturation(models[0], arguments).shares.keys() == {"cell"}
    assert models[0].cell._autocast_by_torch


def test_frozen_weights_no_grad_and_states_without_influence():
    lstm = fastrnn.LSTM(I, H).requires_grad_(False)
    input = torch.randn(T, B, I)
    with torch.no_grad():
        flow = gradient_flow(lstm, (input, 3), lambda result, t: result[0][t].sum())
    norms = flow.norms["LSTM layer 0"]
    assert (norms[:4] > 0).all() and (norms[4:] == 0).all()


def test_the_random_numbers_of_dropout_are_those_of_a_plain_call():
    model = fastrnn.GRU(I, H, num_layers=2, dropout=0.5)
    batch = torch.randn(T, B, I), torch.randn(T, B, H)
    losses = []
    torch.manual_seed(1)
    expected = mse_loss(model(batch[0])[0], batch[1])
    torch.manual_seed(1)
    gradient_flow(model, batch, lambda result, y: losses.append(mse_loss(result[0], y)) or losses[0])
    torch.testing.assert_close(losses[0], expected)


@pytest.mark.extended
def test_a_compiled_model():
    model = Decoder(fastrnn)
    batch = torch.randn(4, B, I), torch.randn(2, B, I), torch.randn(B, H)
    expected = gradient_flow(model, batch, mse_loss)
    compiled = torch.compile(model)
    compiled(*batch[:2])
    flow = gradient_flow(compiled, batch, mse_loss)
    assert [n.removeprefix("_orig_mod.") for n in flow.norms] == list(expected.norms)
    for ours, theirs in zip(flow.norms.values(), expected.norms.values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_norms_of_tiny_gradients_do_not_underflow():
    rnn = fastrnn.RNN(1, 1, bias=False)
    with torch.no_grad():
        rnn.weight_hh_l0.fill_(1e-3)
        rnn.weight_ih_l0.fill_(0)
    flow = gradient_flow(rnn, (torch.zeros(12, 1, 1), 0), lambda result, _: result[1].sum())
    expected = torch.tensor([1e-3], dtype=torch.float64) ** torch.arange(11, -1, -1)
    torch.testing.assert_close(flow.norms["RNN layer 0"], expected, rtol=1e-5, atol=0)
    assert flow.reach("RNN layer 0") == pytest.approx(1e-33)


def test_saturation_of_the_input_alone_and_as_text():
    rnn = fastrnn.RNN(1, 1, bias=False)
    with torch.no_grad():
        rnn.weight_ih_l0.fill_(9)
        rnn.weight_hh_l0.zero_()
    input = torch.tensor([-1.0, 0, 0, 1])[:, None, None]
    for batch in (input, (input, None), pack_padded_sequence(input, torch.tensor([4]))):
        assert str(saturation(rnn, batch)) == "RNN layer 0  h  low  25.0%  high  25.0%"


def test_drawing(tmp_path):
    batch = torch.randn(T, B, I), torch.randn(T, B, 2 * H)
    flows = {}
    for name in ("RNN", "GRU", "LSTM"):
        module = getattr(fastrnn, name)(I, H, num_layers=2, bidirectional=True)
        flows[name] = gradient_flow(module, batch, lambda result, y: mse_loss(result[0], y))
    diagnostics.draw(flows["RNN"], tmp_path / "one.png")
    diagnostics.draw(flows, str(tmp_path / "three.png"))
    zero = diagnostics.GradientFlow({"RNN layer 0": torch.zeros(3, dtype=torch.float64)}, 1e-7)
    diagnostics.draw(zero, tmp_path / "zero.svg")
    assert all((tmp_path / name).read_bytes()[1:4] == b"PNG" for name in ("one.png", "three.png"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch": torch.zeros(T, B, I)}, TypeError, "expected batch to be .*, got a tensor of shape"),
        ({"batch": (torch.zeros(T, B, I),)}, TypeError, "expected batch to be .*, got a tuple of 1"),
        ({"batch": {"input": 0, "target": 0}}, TypeError, "expected batch to be .*, got a dict"),
        (
            {"loss_fn": lambda result, _: result[0]},
            ValueError,
            r"expected loss_fn to .*, got a tensor of shape \(6, 4, 5\)",
        ),
        ({"loss_fn": lambda result, _: 0.0}, ValueError, "expected loss_fn to return one element, got a float"),
        (
            {"model": nn.Linear(I, H), "loss_fn": lambda r, _: r.sum()},
            ValueError,
            "expected model to run a recurrent module",
        ),
        ({"model": 3}, TypeError, "expected a torch.nn.Module, got int"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    good = {
        "model": fastrnn.GRU(I, H),
        "batch": (torch.zeros(T, B, I), 0),
        "loss_fn": lambda result, _: result[0].sum(),
    }
    given = good | arguments
    with pytest.raises(error, match=message):
        gradient_flow(**given)
    if arguments.keys() != {"loss_fn"} and not isinstance(given["batch"], torch.Tensor):  # which will do
        with pytest.raises(error, match=message):
            saturation(given["model"], given["batch"])


@pytest.mark.parametrize("margin", [0, 0.5, -1])
def test_bad_margin(margin):
    with pytest.raises(ValueError, match=r"expected margin to be in \(0, 0.5\)"):
        saturation(fastrnn.GRU(I, H), torch.zeros(T, B, I), margin=margin)
