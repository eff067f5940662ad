# SPDX-License-Identifier: BSD-3-Clause
"""The definition: every cell in plain differentiable torch, and the loop over time that all of them share.

The tests measure the kernels against these functions in float64, the benchmark uses them as a baseline, and
derivatives of higher order are taken through them. The layers have the signatures of `fastrnn.ops`: one layer, one
direction, no write into any argument, differentiable in every floating-point argument.

Letters: T time, B batch, I input, H hidden, P projection, N the sum of `batch_sizes`, G gates per cell.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm as normalise
from torch.nn.functional import linear, logsigmoid

# A cell takes the gates' share of the input (*, G*H), their share of the hidden state (*, G*H) and the states, each
# (*, H). It returns the next states, h first, and its gates by name, each (*, H).
States = tuple[Tensor, ...]
Gates = dict[str, Tensor]
Cell = Callable[[Tensor, Tensor, States], tuple[States, Gates]]
Norm = Callable[[Tensor], Tensor]

_ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "leaky_relu": torch.nn.functional.leaky_relu}


def rnn_cell(gx: Tensor, gh: Tensor, states: States, nonlinearity: str = "tanh") -> tuple[States, Gates]:
    """Computes h' = tanh(gx + gh), or relu, or leaky_relu with the slope 0.01."""
    h = _ACTIVATIONS[nonlinearity](gx + gh)
    return (h,), {"h": h}


def gru_cell(gx: Tensor, gh: Tensor, states: States) -> tuple[States, Gates]:
    """Computes r, z = sigmoid(gx + gh); n = tanh(gx + r gh); h' = (1 - z) n + z h."""
    (h,) = states
    gx_r, gx_z, gx_n = gx.chunk(3, -1)
    gh_r, gh_z, gh_n = gh.chunk(3, -1)
    r = torch.sigmoid(gx_r + gh_r)
    z = torch.sigmoid(gx_z + gh_z)
    n = torch.tanh(gx_n + r * gh_n)
    return ((1 - z) * n + z * h,), {"r": r, "z": z, "n": n}


def gru_before_cell(gx: Tensor, h: Tensor, states: States, w_hh: Tensor, b_hh: Tensor | None) -> tuple[States, Gates]:
    """Computes the GRU that resets before the product: n = tanh(gx + W_hn (r h) + b_hn) (Cho et al., 2014).

    Takes h, as the products read it, in place of its share of the gates.
    """
    w_r, w_z, w_n = w_hh.chunk(3)
    b_r, b_z, b_n = (None,) * 3 if b_hh is None else b_hh.chunk(3)
    gx_r, gx_z, gx_n = gx.chunk(3, -1)
    r = torch.sigmoid(gx_r + linear(h, w_r, b_r))
    z = torch.sigmoid(gx_z + linear(h, w_z, b_z))
    n = torch.tanh(gx_n + linear(r * h, w_n, b_n))
    return ((1 - z) * n + z * states[0],), {"r": r, "z": z, "n": n}


def lstm_gates(gx: Tensor, gh: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes i, f, o = sigmoid(gx + gh); g = tanh(gx + gh)."""
    i, f, g, o = (gx + gh).chunk(4, -1)
    return torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)


def lstm_cell(gx: Tensor, gh: Tensor, states: States) -> tuple[States, Gates]:
    """Computes c' = f c + i g; h' = o tanh(c'), with the gates of `lstm_gates`."""
    _, c = states
    i, f, g, o = lstm_gates(gx, gh)
    c = f * c + i * g
    return (o * torch.tanh(c), c), {"i": i, "f": f, "g": g, "o": o}


def coupled_lstm_cell(gx: Tensor, gh: Tensor, states: States) -> tuple[States, Gates]:
    """Computes the LSTM with i = 1 - f: three gates f, g, o (Greff et al., 2017)."""
    _, c = states
    f, g, o = (gx + gh).chunk(3, -1)
    f, g, o = torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    c = f * c + (1 - f) * g
    return (o * torch.tanh(c), c), {"f": f, "g": g, "o": o}


def peephole_lstm_cell(gx: Tensor, gh: Tensor, states: States, w_peephole: Tensor) -> tuple[States, Gates]:
    """Computes the LSTM whose gates see c: i and f see w_i c and w_f c, o sees w_o c' (Gers et al., 2002)."""
    _, c = states
    w_i, w_f, w_o = w_peephole.chunk(3)
    i, f, g, o = (gx + gh).chunk(4, -1)
    i, f, g = torch.sigmoid(i + w_i * c), torch.sigmoid(f + w_f * c), torch.tanh(g)
    c = f * c + i * g
    o = torch.sigmoid(o + w_o * c)
    return (o * torch.tanh(c), c), {"i": i, "f": f, "g": g, "o": o}


def slstm_cell(gx: Tensor, gh: Tensor, states: States) -> tuple[States, Gates]:
    """Computes the sLSTM (Beck et al., 2024): m' = max(log f + m, i); c' = f c + i z; n' = f n + i; h' = o c' / n'.

    Here i and f are exponentials relative to m', which keeps them in range and has no gradient; f is a sigmoid before,
    and that is the gate handed out. Where n is 0, nothing has been stored: m' is i.
    """
    _, c, n, m = states
    i, f, z, o = (gx + gh).chunk(4, -1)
    log_f, z, o = logsigmoid(f), torch.tanh(z), torch.sigmoid(o)
    stored = n.detach() > 0
    m_next = torch.where(stored, torch.maximum(log_f + m, i), i).detach()
    kept = torch.exp(torch.where(stored, log_f + m.detach() - m_next, -torch.inf))
    i = torch.exp(i - m_next)
    c = kept * c + i * z
    n = kept * n + i
    return (o * c / n, c, n, m_next), {"f": torch.sigmoid(f), "z": z, "o": o}


# How many gates are normalised together: i, f, g and o; r and z, n.
LAYER_NORM_GROUPS = {"LSTM": (4,), "GRU": (2, 1)}


def layer_norm_gates(products: Tensor, gain: Tensor, bias: Tensor | None, groups: Sequence[int]) -> Tensor:
    """Computes gain LN(products) + bias (Ba, Kiros, Hinton, "Layer normalization", 2016).

    Args:
        products: (*, G*H), those of a weight with an input or a state.
        gain: (G*H,)
        bias: (G*H,), or None.
        groups: How many gates are normalised together: numbers that add up to G.
    """
    width = products.shape[-1]
    if len(groups) == 1:
        return normalise(products, (width,), gain, bias)
    parts = torch.split(products, [width // sum(groups) * gates for gates in groups], -1)
    scaled = torch.cat([normalise(part, part.shape[-1:]) for part in parts], -1) * gain
    return scaled if bias is None else scaled + bias


def _itself(products: Tensor) -> Tensor:
    return products


def _norms(kind: str, gain_ih: Tensor, gain_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> tuple[Norm, Norm]:
    groups = LAYER_NORM_GROUPS[kind]
    of_x = partial(layer_norm_gates, gain=gain_ih, bias=b_ih, groups=groups)
    return of_x, partial(layer_norm_gates, gain=gain_hh, bias=b_hh, groups=groups)


def layer_norm_lstm_cell(
    gx: Tensor, gh: Tensor, states: States, gain_c: Tensor, bias_c: Tensor | None
) -> tuple[States, Gates]:
    """Computes c' = f c + i g; h' = o tanh(gain_c LN(c') + bias_c), with the gates of `lstm_gates`."""
    _, c = states
    i, f, g, o = lstm_gates(gx, gh)
    c = f * c + i * g
    h = o * torch.tanh(normalise(c, c.shape[-1:], gain_c, bias_c))
    return (h, c), {"i": i, "f": f, "g": g, "o": o}


class _ClipGradient(torch.autograd.Function):
    """The identity, with a gradient clamped to [-most, most]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, most: float) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.most = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.clamp(-ctx.most, ctx.most), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.clone()


def _run(
    cell: Cell,
    input: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    states: States,
    *,
    makes_products: bool = False,
    norm: tuple[Norm, Norm] = (_itself, _itself),
    w_hr: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    h_mask: Tensor | None = None,
    zone_h: Tensor | None = None,
    grad_clip: float = 0.0,
    zone_c: Tensor | None = None,
    gates: list[Gates] | None = None,
) -> tuple[Tensor, Tensor | None, States]:
    """Steps a cell through time. Returns h and c (if there is one) after every step, and the states after the last.

    A cell that `makes_products` itself gets h in place of its share of the gates. `norm` is what happens to the
    products of the input and of h. `gates` takes those of each step.
    """

    def steps_of(rows: Tensor) -> Sequence[Tensor]:
        return rows.unbind() if batch_sizes is None else torch.split(rows, batch_sizes.tolist())

    of_x, of_h = norm
    x_gates = steps_of(of_x(input if w_ih is None else linear(input, w_ih, b_ih)))
    resets = None if reset is None else steps_of(reset)
    zones = [None if z is None else [z] * len(x_gates) if z.dim() == 1 else steps_of(z) for z in (zone_h, zone_c)]
    outputs: list[Tensor] = []
    cells: list[Tensor] = []
    times = range(len(x_gates))
    for t in reversed(times) if reverse else times:
        gx = x_gates[t]
        # Rows are sorted by length: the first ones are active. The others have ended or, in reverse, not begun.
        active = tuple(state[: len(gx)] for state in states)
        if resets is not None:
            active = tuple(torch.where(resets[t].unsqueeze(1), 0, state) for state in active)
        if grad_clip > 0:
            active = tuple(_ClipGradient.apply(state, grad_clip) for state in active)  # type: ignore[no-untyped-call]
        h = active[0] if h_mask is None else active[0] * h_mask[: len(gx)]
        after, of_step = cell(gx, h if makes_products else of_h(linear(h, w_hh, b_hh)), active)
        if gates is not None:
            gates.append(of_step)
        new = list(after)
        if w_hr is not None:
            new[0] = linear(new[0], w_hr)
        for k, zone in enumerate(zones):
            if zone is not None:
                new[k] = zone[t] * active[k] + (1 - zone[t]) * new[k]
        if lengths is not None:
            alive = (t < lengths).unsqueeze(1)
            outputs.append(torch.where(alive, new[0], 0))
            cells += [torch.where(alive, c, 0) for c in new[1:2]]
            states = tuple(torch.where(alive, after, before) for after, before in zip(new, states, strict=True))
            continue
        outputs.append(new[0])
        cells += new[1:2]
        states = tuple(new) if len(gx) == len(states[0]) else _replace_first_rows(states, new)
    if not outputs:
        return input.new_empty(*input.shape[:-1], states[0].shape[-1]), None, states
    if reverse:
        outputs.reverse()
        cells.reverse()
    join = torch.stack if batch_sizes is None else torch.cat
    return join(outputs), join(cells) if cells else None, states


def _replace_first_rows(states: States, rows: Sequence[Tensor]) -> States:
    return tuple(torch.cat([new, state[len(new) :]]) for state, new in zip(states, rows, strict=True))


def rnn_layer(
    input: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    *,
    nonlinearity: str = "tanh",
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Runs one direction of one RNN layer; see `lstm_layer` for the arguments.

    Returns:
        output (T, B, H), or packed (N, H), and h_n (B, H).
    """
    cell = partial(rnn_cell, nonlinearity=nonlinearity)
    output, _, (h_n,) = _run(cell, input, w_ih, w_hh, b_ih, b_hh, (h0,), **options)
    return output, h_n


def gru_layer(
    input: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    *,
    reset_after: bool = True,
    layer_norm: Sequence[Any] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Runs one direction of one GRU layer; see `lstm_layer` for the arguments.

    Args:
        input: (T, B, I), or packed (N, I).
        w_ih: (3*H, I), or None.
        w_hh: (3*H, H).
        b_ih: (3*H,), or None.
        b_hh: (3*H,), or None.
        h0: (B, H).
        reset_after: Whether r multiplies after the product, `gru_cell`, or before it, `gru_before_cell`.
        layer_norm: The gains of `layer_norm_gates`, ``gain_ih`` and ``gain_hh``, (3*H,), with the groups r and z, and
            n. Or None.
        options: As of `lstm_layer`.

    Returns:
        output (T, B, H), or packed (N, H), and h_n (B, H).
    """
    cell: Cell = gru_cell
    if not reset_after:
        cell, options = partial(gru_before_cell, w_hh=w_hh, b_hh=b_hh), options | {"makes_products": True}
    if layer_norm is not None:
        gain_ih, gain_hh = layer_norm
        options = options | {"norm": _norms("GRU", gain_ih, gain_hh, b_ih, b_hh)}
        b_ih = b_hh = None
    output, _, (h_n,) = _run(cell, input, w_ih, w_hh, b_ih, b_hh, (h0,), **options)
    return output, h_n


def lstm_layer(
    input: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    *,
    coupled: bool = False,
    w_peephole: Tensor | None = None,
    layer_norm: Sequence[Any] | None = None,
    return_cells: bool = False,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Runs one direction of one LSTM layer.

    Args:
        input: (T, B, I), or packed (N, I). Without `w_ih`: x_gates = W_ih x + b_ih, (..., G*H).
        w_ih: (G*H, I), or None.
        w_hh: (G*H, H), or (G*H, P) with a projection.
        b_ih: (G*H,), or None.
        b_hh: (G*H,), or None.
        h0: (B, H), or (B, P) with a projection.
        c0: (B, H).
        coupled: Whether the cell is `coupled_lstm_cell`: G = 3.
        w_peephole: (3*H,): the cell is `peephole_lstm_cell`. Or None.
        layer_norm: ``gain_ih`` and ``gain_hh``, (4*H,), of `layer_norm_gates`, all gates together, then ``gain_c`` and
            ``bias_c`` (or None), (H,), of `layer_norm_lstm_cell`. Or None.
        return_cells: Whether to return c after every step.
        options: ``w_hr``, the projection (P, H); ``batch_sizes``, for packed input the number of sequences that reach
            each step, (T,), int64, not increasing; ``reverse``, to step from the last time to the first; the controls
            of `fastrnn.ops.Controls`; and ``gates``, a list to which the gates of each step are appended, by name.

    Returns:
        output (T, B, H or P), or packed (N, H or P), h_n (B, H or P) and c_n (B, H); c (T, B, H) with `return_cells`.
    """
    cell: Cell = lstm_cell if w_peephole is None else partial(peephole_lstm_cell, w_peephole=w_peephole)
    cell = coupled_lstm_cell if coupled else cell
    if layer_norm is not None:
        gain_ih, gain_hh, gain_c, bias_c = layer_norm
        cell = partial(layer_norm_lstm_cell, gain_c=gain_c, bias_c=bias_c)
        options = options | {"norm": _norms("LSTM", gain_ih, gain_hh, b_ih, b_hh)}
        b_ih = b_hh = None
    output, cells, (h_n, c_n) = _run(cell, input, w_ih, w_hh, b_ih, b_hh, (h0, c0), **options)
    if not return_cells:
        return output, h_n, c_n
    return output, h_n, c_n, c_n.new_empty(*output.shape[:-1], c_n.shape[-1]) if cells is None else cells


def slstm_layer(
    input: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs one direction of one sLSTM layer; see `lstm_layer` for the arguments.

    Args:
        input: (T, B, I), or packed (N, I).
        w_ih: (4*H, I), or None.
        w_hh: (4*H, H).
        b_ih: (4*H,), or None.
        b_hh: (4*H,), or None.
        h0: (B, H).
        c0: The states c, n and m: (3, B, H).
        options: As of `lstm_layer`.

    Returns:
        output (T, B, H), or packed (N, H), h_n (B, H) and c_n (3, B, H).
    """
    states = (h0, *c0.unbind())
    output, _, (h_n, *others) = _run(slstm_cell, input, w_ih, w_hh, b_ih, b_hh, states, **options)
    return output, h_n, torch.stack(others)
