# SPDX-License-Identifier: BSD-3-Clause
"""Derivatives of every kind, of modules and ops, against those of plain torch: torch.func, forward mode, second order.

Where torch.nn can, it is the truth; where it cannot (vmap over weights, per-sample gradients), a Python loop over its
members is.
"""

from functools import partial

import pytest
import torch
from parity import CELLS, Case, LayerCase, call, draw
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fastrnn
from fastrnn import ops, reference

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func.jvp calls it

CELL_MODULES = ("RNNCell", "GRUCell", "LSTMCell")


def assert_trees_close(ours, expected, **tolerance):
    ours, expected = tree_leaves(ours), tree_leaves(expected)
    assert len(ours) == len(expected) > 0
    for our, their in zip(ours, expected, strict=True):
        torch.testing.assert_close(our, their, **tolerance)


class Model:
    """A module of ours and torch.nn's with the same weights, and a loss of its outputs as a function of parameters."""

    def __init__(self, case, device):
        self.ours, self.theirs = case.module(fastrnn, device=device), case.module(nn, device=device)
        self.ours.load_state_dict(self.theirs.state_dict())
        self.parameters = {name: p.detach() for name, p in self.ours.named_parameters()}
        self.shape, self.like = (case.T, case.B, case.I), next(iter(self.parameters.values()))

    def input(self, *members):
        return self.like.new_empty(*members, *self.shape).normal_()

    def loss(self, module):
        def loss(parameters, input):
            output, states = functional_call(module, parameters, (input,))
            return sum(
                (t * torch.linspace(-1, 1, t.numel()).to(t).view_as(t)).sin().sum()
                for t in tree_leaves((output, states))
            )

        return loss

    def ensemble(self, members):
        return {name: torch.stack([p * (1 + 0.1 * k) for k in range(members)]) for name, p in self.parameters.items()}


@pytest.fixture(
    params=[Case(cell, T=3, B=2, I=2, H=3, dtype=torch.float64) for cell in CELLS]
    + [
        Case("lstm", T=3, B=2, I=2, H=3, dtype=torch.float64, num_layers=2, bidirectional=True, proj_size=2),
        Case("gru", T=3, B=2, I=2, H=3, dtype=torch.float64, num_layers=2, bidirectional=True, bias=False),
    ],
    ids=str,
)
def model(request, device):
    return Model(request.param, device)


# ---------------------------------------------------------------------------------------------------------------------
# torch.func, of one module


@pytest.mark.parametrize(
    "transform",
    [
        grad,
        partial(grad, argnums=1),
        lambda f: lambda p, x: vjp(f, p, x)[1](torch.ones((), dtype=x.dtype, device=x.device)),
        partial(jacrev, argnums=1),
        lambda f: lambda p, x: jvp(partial(f, p), (x,), (x.cos(),)),
        lambda f: lambda p, x: jvp(f, (p, x), ({name: q.sin() for name, q in p.items()}, x.cos())),
        partial(jacfwd, argnums=1),
        partial(hessian, argnums=1),
        lambda f: jacrev(jacrev(f, argnums=1), argnums=1),
        lambda f: jacrev(jacfwd(f, argnums=1), argnums=1),
        lambda f: grad(lambda p, x: sum((g**2).sum() for g in tree_leaves(grad(f)(p, x)))),
    ],
    ids="grad grad_input vjp jacrev jvp jvp_weights jacfwd hessian jacrev_jacrev jacrev_jacfwd grad_grad".split(),
)
def test_torch_func(model, transform):
    input = model.input()
    ours, expected = (transform(model.loss(m))(model.parameters, input) for m in (model.ours, model.theirs))
    assert_trees_close(ours, expected)


def test_torch_func_of_a_packed_layer(device):
    """The ops under grad and jvp, where there is a tensor of integers among the arguments."""
    case = LayerCase("gru", packed=True, reverse=True, dtype=torch.float64)
    arguments = {name: t.to(device) for name, t in case.draw().items()}

    def loss(namespace, arguments):
        return case.call(namespace, arguments)["output"].sin().sum()

    for transform in (
        grad,
        lambda f: lambda a: jvp(f, (a,), (arguments,)),
        lambda f: grad(lambda a: grad(f)(a)["input"].sum()),
    ):
        assert_trees_close(*(transform(partial(loss, namespace))(arguments) for namespace in (ops, reference)))


# ---------------------------------------------------------------------------------------------------------------------
# vmap


@pytest.mark.parametrize("in_dim", [0, 1, 3])
def test_vmap_over_batches(model, in_dim):
    inputs = model.input(4)
    ours = vmap(partial(model.loss(model.ours), model.parameters), in_dims=in_dim)(inputs.movedim(0, in_dim))
    assert_trees_close(ours, torch.stack([model.loss(model.theirs)(model.parameters, x) for x in inputs]))


def test_vmap_over_states(device):
    """The states alone are mapped, so the members share the input."""
    module = fastrnn.LSTM(2, 3, device=device)
    input, h, c = torch.randn(3, 2, 2, device=device), *torch.randn(2, 4, 1, 2, 3, device=device)
    ours = vmap(lambda h, c: module(input, (h, c)))(h, c)
    assert_trees_close(
        ours,
        [torch.stack(t) for t in zip(*(tree_leaves(module(input, s)) for s in zip(h, c, strict=True)), strict=True)],
    )


def test_vmap_over_states_of_an_slstm(device):
    """Of its three states beside h, rows are not the first dimension."""
    module = fastrnn.SLSTM(2, 3, device=device)
    inputs, states = torch.randn(4, 5, 2, 2, device=device), torch.rand(4, 4, 1, 2, 3, device=device)

    def loss(input, states):
        output, last = module(input, tuple(states))
        return sum(result.sin().sum() for result in (output, *last))

    members = list(zip(inputs, states, strict=True))
    assert_trees_close(vmap(loss)(inputs, states), torch.stack([loss(*member) for member in members]))
    ours = vmap(grad(loss, argnums=(0, 1)))(inputs, states)
    expected = [torch.func.grad(loss, argnums=(0, 1))(*member) for member in members]
    assert_trees_close(ours, tuple(torch.stack(grads) for grads in zip(*expected, strict=True)))


def test_vmap_over_weights(model):
    ensemble, input = model.ensemble(3), model.input()
    members = [{name: p[k] for name, p in ensemble.items()} for k in range(3)]
    loss, truth = model.loss(model.ours), model.loss(model.theirs)
    assert_trees_close(vmap(loss, (0, None))(ensemble, input), torch.stack([truth(p, input) for p in members]))
    inputs = model.input(3)
    ours = vmap(grad(loss))(ensemble, inputs)
    expected = [grad(truth)(p, x) for p, x in zip(members, inputs, strict=True)]
    assert_trees_close(ours, {name: torch.stack([e[name] for e in expected]) for name in ours})
    ours = grad(lambda p: vmap(loss)(p, inputs).sum())(ensemble)
    assert_trees_close(ours, {name: torch.stack([e[name] for e in expected]) for name in ours})


def test_per_sample_gradients(model):
    inputs = model.input(5)
    ours = vmap(grad(model.loss(model.ours)), in_dims=(None, 0))(model.parameters, inputs)
    expected = [grad(model.loss(model.theirs))(model.parameters, x) for x in inputs]
    assert_trees_close(ours, {name: torch.stack([e[name] for e in expected]) for name in ours})


def test_nested_vmap(model):
    ensemble, inputs = model.ensemble(2), model.input(3)
    ours = vmap(vmap(grad(model.loss(model.ours)), (None, 0)), (0, None))(ensemble, inputs)
    for k in range(2):
        member = {name: p[k] for name, p in ensemble.items()}
        for i, x in enumerate(inputs):
            expected = grad(model.loss(model.theirs))(member, x)
            assert_trees_close({name: g[k, i] for name, g in ours.items()}, expected)


def test_per_sample_hessian(device):
    model = Model(Case("gru", T=2, B=1, I=2, H=2, dtype=torch.float64), device)
    inputs = model.input(2)
    ours = vmap(hessian(model.loss(model.ours), argnums=1), (None, 0))(model.parameters, inputs)
    expected = [hessian(model.loss(model.theirs), argnums=1)(model.parameters, x) for x in inputs]
    assert_trees_close(ours, torch.stack(expected))


def test_vmap_in_eager_autograd(model):
    """Rows of a Jacobian at once: vmap over the backward of a forward that ran without it."""
    input = model.input().requires_grad_()
    rows = []
    for module in (model.ours, model.theirs):
        output, _ = module(input)
        basis = torch.eye(output.numel(), dtype=output.dtype, device=output.device).view(-1, *output.shape)
        if module is model.ours:
            rows.append(torch.autograd.grad(output, input, basis, is_grads_batched=True))
        else:
            rows.append(torch.stack([torch.autograd.grad(output, input, b, retain_graph=True)[0] for b in basis]))
    assert_trees_close(*rows)


def test_stacked_modules(device):
    """The recipe of torch's tutorial on ensembles, with modules of ours."""
    modules = [fastrnn.LSTM(3, 4, device=device) for _ in range(3)]
    stacked, buffers = stack_module_state(modules)
    input = torch.randn(5, 2, 3, device=device)
    ours, _ = vmap(lambda p, b: functional_call(modules[0], (p, b), (input,)), (0, 0))(stacked, buffers)
    assert_trees_close(ours, torch.stack([module(input)[0] for module in modules]))


@pytest.mark.parametrize("name", CELL_MODULES)
def test_cells(name, device):
    ours = getattr(fastrnn, name)(3, 4, device=device, dtype=torch.float64)
    theirs = getattr(nn, name)(3, 4, device=device, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    parameters = {n: p.detach() for n, p in ours.named_parameters()}
    inputs = torch.randn(5, 2, 3, device=device, dtype=torch.float64)

    def loss(module, parameters, input):
        return sum(t.sin().sum() for t in tree_leaves(functional_call(module, parameters, (input,))))

    ours_of, theirs_of = partial(loss, ours), partial(loss, theirs)
    per_sample = vmap(grad(ours_of), (None, 0))(parameters, inputs)
    expected = [grad(theirs_of)(parameters, x) for x in inputs]
    assert_trees_close(per_sample, {n: torch.stack([e[n] for e in expected]) for n in parameters})
    tangents = (parameters, inputs[0])
    assert_trees_close(*(jvp(f, (parameters, inputs[0]), tangents) for f in (ours_of, theirs_of)))


@pytest.mark.filterwarnings("error")
def test_vmap_of_a_step_of_an_rnn_is_one_call(device):
    cell, layer = fastrnn.RNNCell(3, 4, device=device), fastrnn.RNN(3, 4, device=device)
    inputs = torch.randn(5, 2, 3, device=device)
    torch.testing.assert_close(vmap(cell)(inputs), torch.stack([cell(input) for input in inputs]))
    outputs = [layer(input[None])[0] for input in inputs]
    torch.testing.assert_close(vmap(lambda input: layer(input[None])[0])(inputs), torch.stack(outputs))


@pytest.mark.parametrize("name", CELL_MODULES)
def test_vmap_of_cells_under_autocast(name, device):
    """Which torch.nn's cells do not take."""
    cell, inputs = getattr(fastrnn, name)(3, 4, device=device), torch.randn(5, 2, 3, device=device)

    def loss(input):
        with torch.autocast(device.type, torch.bfloat16):
            return sum(t.float().sin().sum() for t in tree_leaves(cell(input)))

    for function in (loss, grad(loss)):
        expected = torch.stack([function(input) for input in inputs])
        torch.testing.assert_close(vmap(function)(inputs), expected, rtol=0.02, atol=0.001)


@pytest.mark.parametrize("mapped", ["lengths", "reset", "both"])
def test_vmap_over_what_is_said_of_the_steps(mapped, device):
    """Members of lengths and episodes of their own."""
    module = fastrnn.LSTM(2, 3, num_layers=2, bidirectional=True, device=device)
    inputs = torch.randn(4, 5, 2, 2, device=device)
    controls = {
        "lengths": torch.randint(0, 6, (4, 2), device=device),
        "reset": torch.rand(4, 5, 2, device=device) < 0.3,
    }
    controls = {name: value for name, value in controls.items() if mapped in (name, "both")}
    ours = vmap(lambda x, controls: module(x, **controls)[0])(inputs, controls)
    members = [{name: value[k] for name, value in controls.items()} for k in range(4)]
    assert_trees_close(ours, torch.stack([module(x, **own)[0] for x, own in zip(inputs, members, strict=True)]))


def test_vmap_over_lengths_beyond_the_input():
    module = fastrnn.GRU(2, 3)
    with pytest.raises(ValueError, match="expected lengths from 0 to 5"):
        vmap(lambda lengths: module(torch.ones(5, 1, 2), lengths=lengths)[0])(torch.tensor([[5], [6]]))


def test_batch_sizes_cannot_be_mapped(device):
    case = LayerCase("gru", packed=True)
    arguments = {name: t.to(device) for name, t in case.draw().items()}
    sizes = torch.stack([case.batch_sizes, case.batch_sizes])

    def run(batch_sizes):
        return ops.gru_layer(*arguments.values(), batch_sizes=batch_sizes)

    with pytest.raises(RuntimeError, match="expected batch_sizes to be the same for all members of vmap"):
        vmap(run)(sizes)


# ---------------------------------------------------------------------------------------------------------------------
# Forward mode without torch.func


@pytest.mark.parametrize("direct", [False, True], ids=["wrapper", "operator"])
def test_dual_tensors(direct, device):
    """Through fastrnn.ops, and through torch.ops itself."""
    case = LayerCase("lstm", dtype=torch.float64)
    arguments = {name: None if t is None else t.to(device) for name, t in case.draw().items()}
    tangent = torch.randn_like(arguments["input"])

    def run(namespace, input):
        if namespace is ops and direct:
            a = arguments | {"input": input}
            order = ("input", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "w_cell", "h0", "c0")
            return torch.ops.fastrnn.lstm_layer(*(a.get(name) for name in order), None, False, False)[0]
        return case.call(namespace, arguments | {"input": input})["output"]

    results = []
    for namespace in (ops, reference):
        with forward_ad.dual_level():
            results.append(forward_ad.unpack_dual(run(namespace, forward_ad.make_dual(arguments["input"], tangent))))
    assert results[0].tangent.count_nonzero() > 0
    assert_trees_close(tuple(results[0]), tuple(results[1]))


def test_forward_over_backward(model):
    """A Hessian-vector product: dual tensors that require gradients, and the tangent of their gradient."""
    input, direction = model.input(), model.input()
    products = []
    for module in (model.ours, model.theirs):
        leaf = input.clone().requires_grad_()
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(leaf, direction)
            loss = model.loss(module)(model.parameters, dual)
            (gradient,) = torch.autograd.grad(loss, dual)
            products.append(forward_ad.unpack_dual(gradient).tangent)
    assert_trees_close(*products)


TRANSFORMS = {
    "grad": lambda f, x: grad(f)(x),
    "vmap": lambda f, x: vmap(f)(torch.stack([x, x.cos()])),
    "jvp": lambda f, x: jvp(f, (x,), (x,)),
    "per_sample": lambda f, x: vmap(grad(f))(torch.stack([x, x.cos()])),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func_of_the_operator_itself(transform, device):
    case = LayerCase("gru", dtype=torch.float64)
    input, *rest = (t.to(device) for t in case.draw().values())
    *weights, h0 = rest

    def ours(input):
        return torch.ops.fastrnn.gru_layer(input, *weights, None, h0, None, False, False)[0].sin().sum()

    def expected(input):
        return reference.gru_layer(input, *rest)[0].sin().sum()

    assert_trees_close(TRANSFORMS[transform](ours, input), TRANSFORMS[transform](expected, input))


# ---------------------------------------------------------------------------------------------------------------------
# Second order, as people use it


def test_gradient_penalty(model):
    """WGAN-GP: the norm of the critic's gradient with respect to its input, and the derivative of that."""
    gradients = []
    for module in (model.ours, model.theirs):
        torch.manual_seed(1)
        input = model.input().requires_grad_()
        output, _ = module(input)
        (gradient,) = torch.autograd.grad(output.sum(), input, create_graph=True)
        penalty = ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean()
        gradients.append(torch.autograd.grad(output.mean() + 10 * penalty, list(module.parameters())))
    assert_trees_close(*gradients)


def test_meta_learning(model):
    """MAML: two inner steps of gradient descent, differentiated through, with autograd and with torch.func."""
    inner, outer = model.input(2)

    def meta_loss(module, parameters, gradient):
        for _ in range(2):
            step = gradient(model.loss(module), parameters)
            parameters = {name: p - 0.1 * step[name] for name, p in parameters.items()}
        return model.loss(module)(parameters, outer)

    def by_autograd(loss, parameters):
        grads = torch.autograd.grad(loss(parameters, inner), list(parameters.values()), create_graph=True)
        return dict(zip(parameters, grads, strict=True))

    def by_func(loss, parameters):
        return grad(loss)(parameters, inner)

    results = []
    for module, gradient in ((model.ours, by_autograd), (model.ours, by_func), (model.theirs, by_autograd)):
        leaves = {name: p.clone().requires_grad_() for name, p in model.parameters.items()}
        results.append(torch.autograd.grad(meta_loss(module, leaves, gradient), list(leaves.values())))
    results.append(tuple(grad(lambda p: meta_loss(model.ours, p, by_func))(model.parameters).values()))
    for ours in (*results[:2], results[3]):
        assert_trees_close(ours, results[2])


@pytest.mark.parametrize("layout", ["dense", "packed_unsorted", "batch_first"])
def test_second_order_of_modules(layout, device):
    """gradgradcheck of a whole stack: input, states and weights."""
    case = Case("lstm", T=2, B=2, I=1, H=1, dtype=torch.float64, layout=layout, num_layers=2, bidirectional=True)
    module = case.module(fastrnn, device=device)
    tensors, lengths = draw(case)
    tensors = {name: t.to(device) for name, t in tensors.items()}
    names = ("input", "h0", "c0", "weight_hh_l0_reverse", "weight_ih_l1")

    def function(*leaves):
        given = dict(zip(names, leaves, strict=True))
        weights = {name: given.pop(name) for name in names[3:]}
        with torch.nn.utils.stateless._reparametrize_module(module, weights):
            return tuple(call(case, module, tensors | given, lengths).values())

    leaves = [tensors[n] if n in tensors else module.get_parameter(n) for n in names]
    assert torch.autograd.gradgradcheck(function, [t.detach().requires_grad_() for t in leaves])


def test_third_order(device):
    case = LayerCase("gru", T=2, B=1, I=2, H=2, dtype=torch.float64)
    results = []
    for namespace in (ops, reference):
        leaves = {name: t.to(device).requires_grad_() for name, t in case.draw().items()}
        value = case.call(namespace, leaves)["output"].sin().sum()
        for _ in range(3):
            grads = torch.autograd.grad(value, list(leaves.values()), create_graph=True)
            value = sum((g**2).sum() for g in grads)
        results.append(grads)
    assert_trees_close(*results)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(model, use_reentrant):
    def run(input):  # flat: reentrant checkpointing loses the gradients of what is nested
        return tuple(tree_leaves(model.ours(input)))

    results = []
    for function in (run, partial(checkpoint, run, use_reentrant=use_reentrant)):
        torch.manual_seed(1)
        leaf = model.input().requires_grad_()
        model.ours.zero_grad()
        sum(t.sin().sum() for t in function(leaf)).backward()
        results.append([leaf.grad, *(p.grad for p in model.ours.parameters())])
    assert_trees_close(*results, rtol=0, atol=0)


def test_second_order_through_checkpointing(model):
    results = []
    for run in (lambda x: model.ours(x)[0], lambda x: checkpoint(lambda x: model.ours(x)[0], x, use_reentrant=False)):
        torch.manual_seed(1)
        leaf = model.input().requires_grad_()
        (first,) = torch.autograd.grad(run(leaf).sin().sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad((first**2).sum(), leaf))
    assert_trees_close(*results)


# ---------------------------------------------------------------------------------------------------------------------
# Autocast around the ops


@pytest.mark.parametrize("cell", CELLS)
def test_ops_compute_in_the_dtype_of_their_arguments_under_autocast(cell, device):
    case = LayerCase(cell)
    arguments = {name: t if t is None else t.to(device) for name, t in case.draw().items()}
    expected = case.run(ops, arguments)
    with torch.autocast(device.type, torch.bfloat16):
        ours = case.run(ops, arguments)
    assert_trees_close(ours, expected, rtol=0, atol=0)


def test_backward_outside_and_inside_autocast(device):
    """Where backward is called makes no difference."""
    module = fastrnn.GRU(3, 4, device=device)
    input = torch.randn(5, 2, 3, device=device)
    results = []
    for inside in (False, True):
        with torch.autocast(device.type, torch.bfloat16):
            output, _ = module(input)
        with torch.autocast(device.type, torch.bfloat16, enabled=inside):
            results.append(torch.autograd.grad(output.float().sin().sum(), list(module.parameters())))
    assert_trees_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("namespace", [fastrnn, nn])
def test_autocast_leaves_float64_alone(namespace, device):
    """As torch's autocast does."""
    module = namespace.LSTM(3, 4, device=device, dtype=torch.float64)
    input = torch.randn(5, 2, 3, device=device, dtype=torch.float64)
    expected = module(input)
    with torch.autocast(device.type, torch.bfloat16):
        assert_trees_close(module(input), expected, rtol=0, atol=0)


def test_inactive_units_pass_no_gradient(device):
    """Of relu; not even an infinite one, as torch's."""
    x, zeros = torch.tensor([[[1.0, -1.0, 0.0]]], device=device), torch.zeros(1, 3, device=device)
    eye, b = torch.eye(3, device=device), torch.zeros(3, device=device, requires_grad=True)
    output, _ = ops.rnn_layer(x, eye, eye, b, None, zeros, nonlinearity="relu")
    (grad,) = torch.autograd.grad(output, b, torch.full_like(output, float("inf")))
    assert grad.tolist() == [float("inf"), 0, 0]
