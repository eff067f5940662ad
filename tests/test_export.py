# SPDX-License-Identifier: BSD-3-Clause
"""Compiled and exported models: torch.compile, torch.export, AOTInductor, ONNX, torch.jit.trace."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from parity import CELLS, Case
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn import _C, _library

CELL_MODULES = ("RNNCell", "GRUCell", "LSTMCell")
DYNAMIC = ({0: torch.export.Dim("T", min=2), 1: torch.export.Dim("B", min=2)},)
SHAPES = ((5, 3), (9, 4), (2, 2))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_same(ours, expected, **tolerance):
    ours, expected = tree_leaves(ours), tree_leaves(expected)
    assert len(ours) == len(expected) > 0
    for our, their in zip(ours, expected, strict=True):
        torch.testing.assert_close(our, their, **tolerance)


def fastrnn_nodes(graph):
    return [node for node in graph.nodes if "fastrnn" in str(node.target)]


class Graphs:
    """A backend that keeps the graphs it is given."""

    def __init__(self):
        self.seen = []

    def __call__(self, graph, _):
        self.seen.append(graph.graph)
        return graph.forward


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile


@pytest.mark.parametrize("case", [Case(cell, num_layers=2, bidirectional=True) for cell in CELLS], ids=str)
def test_one_node_for_each_layer_and_direction(case, device):
    graphs = Graphs()
    module = case.module(fastrnn, device=device)
    torch.compile(module, backend=graphs, fullgraph=True)(torch.randn(5, 3, case.I, device=device))
    assert [len(fastrnn_nodes(graph)) for graph in graphs.seen] == [4]


@pytest.mark.parametrize("name", CELL_MODULES)
def test_compiled_cells(name, device):
    """Over a Python loop, with gradients."""
    cell = getattr(fastrnn, name)(3, 4, device=device)

    def loop(input):
        state = None
        for x in input:
            state = cell(x, state)
        return state

    input = torch.randn(4, 2, 3, device=device)
    results = []
    for function in (loop, torch.compile(loop, backend="aot_eager", fullgraph=True)):
        states = tree_leaves(function(input))
        loss = sum(state.sin().sum() for state in states)
        results.append([*states, *torch.autograd.grad(loss, list(cell.parameters()))])
    assert_same(*results)


@pytest.mark.parametrize("cell", CELLS)
def test_lengths_and_batches_compile_once(cell, device):
    """Without a word about dynamic shapes: at first for one size, at the second one for all."""
    graphs = Graphs()
    case = Case(cell, num_layers=2)
    module = case.module(fastrnn, device=device)
    compiled = torch.compile(module, backend=graphs, fullgraph=True)
    for T, B in ((5, 3), (7, 4), (12, 2), (30, 5), (100, 6)):
        input = torch.randn(T, B, case.I, device=device)
        assert_same(compiled(input), module(input))
    assert len(graphs.seen) == 2


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_compiled_torch_func(transform, cell, device):
    case = Case(cell, T=2)
    module = case.module(fastrnn, device=device)

    def loss(input):
        return module(input)[0].sin().sum()

    function = {"grad": grad(loss), "vmap": vmap(loss)}[transform]
    inputs = torch.randn(*((2,) if transform == "vmap" else ()), case.T, case.B, case.I, device=device)
    assert_same(torch.compile(function, backend="aot_eager", fullgraph=True)(inputs), function(inputs))


@pytest.mark.parametrize("rows", [1, 3])
def test_states_of_another_batch_size_are_refused(rows, device):
    """A batch of sequences of several lengths tells its size at run time only."""
    module = fastrnn.LSTM(3, 4, device=device)
    packed = pack_sequence([torch.randn(5, 3, device=device), torch.randn(2, 3, device=device)])
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    right, wrong = (tuple(torch.zeros(2, 1, n, 4, device=device)) for n in (2, rows))
    assert_same(compiled(packed, right)[0].data, module(packed, right)[0].data)
    with pytest.raises(RuntimeError, match="hidden"):
        compiled(packed, wrong)


def test_compiled_under_autocast(device):
    module = fastrnn.GRU(3, 4, num_layers=2, device=device)
    input = torch.randn(5, 2, 3, device=device)
    results = []
    for function in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        with torch.autocast(device.type, torch.bfloat16):
            output, h_n = function(input)
        loss = output.float().sin().sum()
        results.append([output, h_n, *torch.autograd.grad(loss, list(module.parameters()))])
    assert_same(*results)


# ---------------------------------------------------------------------------------------------------------------------
# torch.export, AOTInductor, torch.jit.trace


def exported(case, device, dynamic_shapes=DYNAMIC):
    module = case.module(fastrnn, device=device).eval()
    input = torch.randn(5, 3, case.I, device=device)
    return module, torch.export.export(module, (input,), dynamic_shapes=dynamic_shapes)


@pytest.mark.parametrize("cell", CELLS)
def test_exported_programs_are_saved_and_loaded(cell, device, tmp_path):
    case = Case(cell, num_layers=2, bidirectional=True)
    module, program = exported(case, device)
    assert len(fastrnn_nodes(program.graph)) == 4
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    for shape in SHAPES:
        input = torch.randn(*shape, case.I, device=device)
        assert_same(loaded(input), module(input))


def test_exported_programs_train(device):
    case = Case("lstm")
    module, program = exported(case, device)
    input = torch.randn(7, 2, case.I, device=device)
    results = []
    for each in (module, program.module()):
        each.zero_grad()
        each(input)[0].sin().sum().backward()
        results.append([p.grad for p in each.parameters()])
    assert_same(*results)


@pytest.mark.extended
@pytest.mark.parametrize("cell", CELLS)
def test_aot_inductor_package(cell, device, tmp_path):
    case = Case(cell, num_layers=2, bidirectional=True)
    module, program = exported(case, device)
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        for shape in SHAPES:
            input = torch.randn(*shape, case.I, device=device)
            assert_same(loaded(input), module(input))


MAIN = """
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>
#include <iostream>

// Arguments: the ops library, the package. Prints the sums of the results for an input of ones.
int main(int, char** argv) {
  if (!dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL)) {
    std::cerr << dlerror() << std::endl;
    return 1;
  }
  c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  std::cout.precision(9);
  for (const auto& result : model.run({torch::ones({11, 4, 7})})) std::cout << result.sum().item<float>() << std::endl;
}
"""


@pytest.mark.extended
def test_aot_inductor_package_in_a_cpp_program(tmp_path):
    case = Case("lstm", num_layers=2)
    module, program = exported(case, torch.device("cpu"))
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        expected = [t.sum() for t in tree_leaves(module(torch.ones(11, 4, case.I)))]
    home = Path(torch.__file__).parent
    (tmp_path / "main.cpp").write_text(MAIN)
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    includes = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]
    # The ops library needs libtorch, which nothing in this program does.
    libraries = [
        f"-L{home / 'lib'}",
        f"-Wl,-rpath,{home / 'lib'}",
        "-Wl,--no-as-needed",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
        "-ldl",
    ]
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-std=c++17", "-O0", abi, *includes, "main.cpp", "-o", "main", *libraries]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run(["./main", _library.path(), package], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same([torch.tensor(float(line)) for line in done.stdout.split()], expected)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
def test_traced_modules(cell, device, tmp_path):
    case = Case(cell, num_layers=2, bidirectional=True)
    module = case.module(fastrnn, device=device)
    traced = torch.jit.trace(module, torch.randn(5, 3, case.I, device=device))
    traced.save(tmp_path / "traced.pt")
    loaded = torch.jit.load(tmp_path / "traced.pt")
    for shape in SHAPES:
        input = torch.randn(*shape, case.I, device=device)
        assert_same(loaded(input), module(input))
        results = []
        for each in (module, loaded):
            each.zero_grad()
            each(input)[0].sin().sum().backward()
            results.append([p.grad for p in each.parameters()])
        assert_same(*results)


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
def test_programs_in_a_fresh_process(tmp_path):
    """All that they need is `import fastrnn`."""
    module = Case("gru", num_layers=2, bidirectional=True).module(fastrnn).eval()
    input, other = torch.randn(5, 3, module.input_size), torch.randn(9, 4, module.input_size)
    torch.export.save(torch.export.export(module, (input,), dynamic_shapes=DYNAMIC), tmp_path / "exported.pt2")
    torch.jit.trace(module, input).save(tmp_path / "traced.pt")
    torch.save([other, module(other)[0]], tmp_path / "expected.pt")
    program = """if True:
        import fastrnn, torch
        input, expected = torch.load("expected.pt")
        for load in (lambda: torch.export.load("exported.pt2").module(), lambda: torch.jit.load("traced.pt")):
            torch.testing.assert_close(load()(input)[0], expected)
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# ONNX

ONNX_CASES = [Case(cell, num_layers=2, bidirectional=True) for cell in CELLS]
ONNX_CASES += [Case("lstm", bias=False, layout="batch_first"), Case("gru", bias=False)]


def onnx_export(*args, **kwargs):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"needs {package}: pip install fastrnn[adoption]")
    from fastrnn import onnx

    return torch.onnx.export(*args, verbose=False, custom_translation_table=onnx.translation_table(), **kwargs)


@pytest.mark.parametrize("case", ONNX_CASES, ids=str)
@pytest.mark.filterwarnings("ignore")  # of torch.onnx about itself
def test_onnx_runs_the_standard_operators(case, tmp_path):
    module = case.module(fastrnn).eval()
    program = onnx_export(module, (torch.randn(5, 3, case.I),), dynamic_shapes=DYNAMIC)
    operators = [node.op_type for node in program.model.graph if node.op_type in ("RNN", "GRU", "LSTM")]
    assert operators == [case.cell.split("_")[0].upper()] * (case.num_layers * (1 + case.bidirectional))
    program.save(tmp_path / "model.onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for shape in SHAPES:
        input = torch.randn(*shape, case.I)
        ours = session.run(None, {session.get_inputs()[0].name: input.numpy()})
        assert_same([torch.from_numpy(a) for a in ours], module(input))


@pytest.mark.parametrize("name", CELL_MODULES)
@pytest.mark.filterwarnings("ignore")
def test_onnx_cells(name, tmp_path):
    module = getattr(fastrnn, name)(3, 4).eval()
    input = torch.randn(2, 3)
    onnx_export(module, (input,)).save(tmp_path / "model.onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    ours = session.run(None, {session.get_inputs()[0].name: input.numpy()})
    assert_same([torch.from_numpy(a) for a in ours], module(input))


@pytest.mark.filterwarnings("ignore")
def test_onnx_refuses_projections():
    module = fastrnn.LSTM(3, 4, proj_size=2).eval()
    with pytest.raises(torch.onnx.OnnxExporterError) as error:
        onnx_export(module, (torch.randn(5, 2, 3),))
    assert "ONNX's LSTM has no form for a projection" in str(error.value)


@pytest.mark.parametrize("name", ["GRU", "LSTM"])
@pytest.mark.filterwarnings("ignore")  # of torch.onnx about itself
def test_onnx_knows_lengths(name, tmp_path):
    module = getattr(fastrnn, name)(3, 7, bidirectional=True)
    arguments = {"input": torch.randn(5, 3, 3), "lengths": torch.tensor([2, 5, 1])}
    onnx_export(module, (), kwargs=arguments).save(tmp_path / "model.onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    feed = {known.name: arguments[known.name].numpy() for known in session.get_inputs()}
    torch.testing.assert_close(
        torch.from_numpy(session.run(None, feed)[0]), module(**arguments)[0], rtol=1e-5, atol=1e-6
    )


# ---------------------------------------------------------------------------------------------------------------------
# fastrnn.explain


def test_explain_names_each_layer_and_direction(device):
    module = fastrnn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2, batch_first=True, device=device)
    text = str(fastrnn.explain(module, torch.randn(64, 30, 3, device=device)))
    for line in ("layer 0 (T=30 B=64 I=3 H=4 P=2 float32)", "layer 1 reverse (T=30 B=64 I=4 H=4 P=2 float32)"):
        assert line in text
    kernels = [line for line in text.splitlines() if ("fused CPU kernel" if device.type == "cpu" else "path ") in line]
    assert len(kernels) == 4
    assert all(line.split(": ")[-1] for line in kernels)
    assert text.splitlines() == kernels, "only what is to be said of this call"


@pytest.mark.parametrize("name", CELL_MODULES)
def test_explain_a_cell(name, device):
    explanation = fastrnn.explain(getattr(fastrnn, name)(3, 4, device=device), torch.randn(2, 3, device=device))
    assert len(explanation.layers) == 1
    assert explanation.layers[0].startswith(f"{name} (T=1 B=2 I=3 H=4 float32)")
    is_left_to_torch = "torch's own operator for one step" in explanation.layers[0]
    assert is_left_to_torch == (name == "RNNCell" and device.type == "cpu")
    with torch.autocast(device.type, torch.bfloat16):
        explanation = fastrnn.explain(getattr(fastrnn, name)(3, 4, device=device), torch.randn(2, 3, device=device))
    assert "float32): torch's own operator, for which autocast keeps" in explanation.layers[0]


@pytest.mark.parametrize("name", ("RNN", "GRU", "LSTM", "SLSTM", *CELL_MODULES))
def test_explain_a_subclass(name, device):
    """Its name tells nothing: the answer is that of the class."""
    base = getattr(fastrnn, name)
    input = torch.randn(*(() if name in CELL_MODULES else (5,)), 2, 3, device=device)
    for subclass in ("Enc", "RNNEncoder"):
        module = type(subclass, (base,), {})(3, 4, device=device)
        said = str(fastrnn.explain(module, input)).replace(subclass, name)
        assert said == str(fastrnn.explain(base(3, 4, device=device), input))


def test_explain_sees_packing_and_autocast(device):
    packed = pack_sequence([torch.randn(5, 3, device=device), torch.randn(2, 3, device=device)])
    with torch.autocast(device.type, torch.bfloat16):
        explanation = fastrnn.explain(fastrnn.GRU(3, 4, device=device), packed)
    assert explanation.layers[0].startswith("GRU layer 0 (T=5 B=2 I=3 H=4 bfloat16)")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "input",
    [
        torch.zeros(5, 2, 9),
        torch.zeros(5, 2, 3, dtype=torch.float64),
        torch.zeros(5, 2, 3, dtype=torch.int64),
        torch.zeros(5, 2, 3, device="meta"),
        torch.zeros(3),
        torch.zeros(2, 9),
        torch.zeros(1, 5, 2, 3),
        torch.zeros(0, 2, 3),
        torch.zeros(2, 0, 3),
        pack_sequence([torch.zeros(5, 9)]),
        pack_sequence([torch.zeros(5, 3).double()]),
    ],
    ids=lambda input: f"{input.data.device}-{input.data.dtype}-{tuple(input.data.shape)}",
)
def test_explain_raises_what_a_call_raises(input, autocast):
    def outcome(function, *arguments):
        try:
            function(*arguments)
        except (RuntimeError, TypeError, ValueError) as error:
            return type(error), str(error)
        return None

    modules = [getattr(fastrnn, name)(3, 4) for name in ("RNN", "GRU", "LSTM", "SLSTM")]
    cells = [getattr(fastrnn, name)(3, 4) for name in CELL_MODULES] if isinstance(input, torch.Tensor) else []
    with torch.autocast("cpu", enabled=autocast):
        for module in (*modules, fastrnn.GRU(3, 4, batch_first=True), *cells):
            assert outcome(fastrnn.explain, module, input) == outcome(module, input), module


def test_explain_follows_the_plan(device):
    if device.type != "cpu":
        pytest.skip("the threads are those of the CPU")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert "one thread is allowed" in str(fastrnn.explain(fastrnn.GRU(3, 4), torch.randn(5, 2, 3)))
    finally:
        torch.set_num_threads(threads)


LSTM = partial(fastrnn.LSTM, 3, 4)


@pytest.mark.parametrize(
    ("path", "module", "text"),
    [
        (None, LSTM, "path gates (a matrix product and a fused gate kernel per step)"),
        (None, partial(LSTM, peephole=True), "peephole has no persistent kernel"),
        ("gates", LSTM, "per step): forced"),
        ("persistent", LSTM, "path persistent (one kernel for the whole sequence"),
        (
            "persistent",
            partial(fastrnn.GRU, 3, 4, bidirectional=True),
            "path persistent (one kernel for the whole sequence, both",
        ),
        ("persistent", partial(LSTM, proj_size=2), "raises: FASTRNN_PATH=persistent cannot serve this layer"),
        ("persistent", partial(LSTM, peephole=True), "raises: FASTRNN_PATH=persistent cannot serve this"),
        ("persistent", partial(fastrnn.LSTM, 3, 2496, dtype=torch.float16), "blocks; backward raises: the recur"),
        ("fast", LSTM, "a call raises: FASTRNN_PATH is fast, neither gates nor persistent"),
    ],
)
def test_explain_a_cuda_path(path, module, text, h100, monkeypatch):
    if path:
        monkeypatch.setenv("FASTRNN_PATH", path)
    with FakeTensorMode():
        module = module(device="cuda")
        input = torch.empty(5, 2, 3, device="cuda", dtype=module.weight_hh_l0.dtype)
    assert text in fastrnn.explain(module, input).layers[0]
    assert ("with lengths=" in str(fastrnn.explain(module, input))) == ("path persistent" in text or "blocks" in text)
    torch.backends.cudnn.rnn.fp32_precision = "tf32"
    rounds = path == "persistent" and "path persistent" in text and input.dtype == torch.float32
    assert ("products in TF32" in fastrnn.explain(module, input).layers[0]) == rounds


def test_explain_a_build_without_kernels(monkeypatch):
    monkeypatch.setattr(nn.init, "uniform_", lambda *_: None)  # there is no such device to draw on
    with FakeTensorMode():
        module, input = fastrnn.GRU(3, 4, device="cuda"), torch.empty(5, 2, 3, device="cuda")
    monkeypatch.setattr(_C, "cuda_version", None)
    assert "a call raises: fastrnn was built without CUDA" in fastrnn.explain(module, input).layers[0]
    if hasattr(torch.ops.fastrnn, "refused_launches"):
        pytest.skip("the other half: this build has the persistent kernels")
    monkeypatch.setattr(_C, "cuda_version", "13.0")
    monkeypatch.setenv("FASTRNN_PATH", "persistent")
    assert "built without FASTRNN_PERSISTENT=1" in fastrnn.explain(module, input).layers[0]


def test_explain_where_there_is_no_kernel():
    module, input = fastrnn.GRU(3, 4, device="meta"), torch.randn(5, 2, 3, device="meta")
    (line,) = str(fastrnn.explain(module, input)).splitlines()
    assert line.endswith("there is no kernel for meta: a call works out shapes alone")
    assert module(input)[0].is_meta


def test_explain_torch_nn_and_others():
    assert "fastrnn.convert" in str(fastrnn.explain(nn.GRU(3, 4), torch.randn(5, 2, 3)))
    with pytest.raises(TypeError, match="expected an RNN, GRU, LSTM or cell, got Linear"):
        fastrnn.explain(nn.Linear(3, 4), torch.randn(5, 3))
