# SPDX-License-Identifier: BSD-3-Clause
"""Training and serving as people do it: several processes, trainers, changed weights, checkpoints, threads."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, Dataset

import fastrnn
from fastrnn import autograd

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_char_lm.py"
NAMES = ("RNN", "GRU", "LSTM")


class Tagger(nn.Module):
    """A model as users write it, of torch.nn's classes alone."""

    def __init__(self, name="LSTM", **options):
        super().__init__()
        self.rnn = getattr(nn, name)(3, 8, num_layers=2, **options)
        self.head = nn.Linear(8, 2)

    def forward(self, input):
        return self.head(self.rnn(input)[0])


def assert_all_close(ours, expected, **tolerance):
    assert len(ours) == len(expected) > 0
    for our, their in zip(ours, expected, strict=True):
        torch.testing.assert_close(our, their, **tolerance)


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 4, 3, generator=generator), torch.randn(5, 4, 2, generator=generator)


def loss_of(model, input, target):
    return nn.functional.mse_loss(model(input), target)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def distributed_gradients(rank, folder):
    """One of two processes: gradients of half of the batch, averaged, under each engine."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.set_num_threads(1)
    input, target = (t[:, rank::2] for t in batch())
    gradients = {}
    for engine in ("ddp", "ddp_accumulated", "fsdp2"):
        torch.manual_seed(0)
        model = Tagger()
        fastrnn.convert(model)
        if engine == "fsdp2":
            mesh = dist.init_device_mesh("cpu", (2,))
            fully_shard(model.rnn, mesh=mesh)
            wrapped = fully_shard(model, mesh=mesh)
        else:
            wrapped = DistributedDataParallel(model)
        if engine == "ddp_accumulated":
            with wrapped.no_sync():
                loss_of(wrapped, input, target).backward()
        loss_of(wrapped, input, target).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        gradients[engine] = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}
    if rank == 0:
        torch.save(gradients, f"{folder}/gradients.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch was built without torch.distributed")
def test_two_processes_have_the_gradients_of_one(tmp_path):
    mp.spawn(distributed_gradients, (str(tmp_path),), nprocs=2)
    gradients = torch.load(tmp_path / "gradients.pt")
    torch.manual_seed(0)
    model = Tagger()
    loss_of(model, *batch()).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    for engine, factor in (("ddp", 1), ("ddp_accumulated", 2), ("fsdp2", 1)):
        assert list(gradients[engine]) == list(expected)
        assert_all_close(list(gradients[engine].values()), [factor * g for g in expected.values()])


@pytest.mark.skipif(not dist.is_available(), reason="this torch was built without torch.distributed")
@pytest.mark.parametrize("order", ["shard, convert", "convert, shard"])
def test_convert_and_revert_what_fsdp_has_sharded(order):
    torch.manual_seed(0)
    model, alone = Tagger(), Tagger()
    alone.load_state_dict(model.state_dict())
    loss_of(alone, *batch()).backward()
    expected = [p.grad for p in alone.parameters()]

    def gradients():
        model.zero_grad()
        loss_of(model, *batch()).backward()
        return [p.grad.full_tensor() for p in model.parameters()]

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        for step in order.split(", "):
            if step == "shard":
                fully_shard(model.rnn, mesh=mesh)
                fully_shard(model, mesh=mesh)
            else:
                assert fastrnn.convert(model).converted == {"rnn": "LSTM"}
        assert isinstance(model.rnn, fastrnn.LSTM) and isinstance(model.rnn, FSDPModule)
        assert_all_close(gradients(), expected)
        fastrnn.revert(model)
        assert isinstance(model.rnn, nn.LSTM) and isinstance(model.rnn, FSDPModule)
        assert_all_close(gradients(), expected)
    finally:
        dist.destroy_process_group()


def run_example(checkpoint, *arguments, processes=1):
    pytest.importorskip("rich", reason="the example needs rich: pip install fastrnn[bench]")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    sizes = "--batch 4 --length 12 --hidden 16 --save-every 3".split()
    command = [sys.executable, *(torchrun if processes > 1 else []), EXAMPLE, *sizes, "--checkpoint", checkpoint]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return torch.load(checkpoint, weights_only=True)


def test_the_example_resumes_exactly(tmp_path):
    whole = run_example(tmp_path / "whole.pt", "--steps", "6", "--precision", "bfloat16")
    run_example(tmp_path / "parts.pt", "--steps", "3", "--precision", "bfloat16")
    parts = run_example(tmp_path / "parts.pt", "--steps", "6", "--precision", "bfloat16")
    assert whole["step"] == parts["step"] == 6
    assert_all_close(list(parts["model"].values()), list(whole["model"].values()), rtol=0, atol=0)


@pytest.mark.extended
def test_the_example_under_torchrun(tmp_path):
    alone = run_example(tmp_path / "alone.pt", "--steps", "2", "--dropout", "0")
    both = run_example(tmp_path / "both.pt", "--steps", "2", "--dropout", "0", processes=2)
    # Adam divides by the root of a mean square: rounding in a tiny gradient moves a weight by a part of the step.
    assert_all_close(list(both["model"].values()), list(alone["model"].values()), rtol=0, atol=3e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Trainers


def trained_by_hand(model, steps):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, *batch()).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning", reason="needs lightning: pip install fastrnn[adoption]")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Tagger()

        def training_step(self, pair, _):
            return loss_of(self.model, *pair)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    torch.manual_seed(0)
    module = Module()
    expected = Tagger()
    expected.load_state_dict(module.model.state_dict())
    assert fastrnn.convert(module).converted == {"model.rnn": "LSTM"}
    options = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = lightning.Trainer(max_steps=3, accelerator="cpu", default_root_dir=tmp_path, **options)
    trainer.fit(module, DataLoader([batch()] * 3, batch_size=None))
    assert_all_close(list(module.parameters()), trained_by_hand(expected, 3))


def test_accelerate():
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install fastrnn[adoption]")
    torch.manual_seed(0)
    model, expected = Tagger(), Tagger()
    expected.load_state_dict(model.state_dict())
    fastrnn.convert(model)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    for _ in range(3):
        optimizer.zero_grad()
        accelerator.backward(loss_of(prepared, *batch()))
        optimizer.step()
    assert_all_close(list(model.parameters()), trained_by_hand(expected, 3))


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_loads_into_what_was_converted_without_weights(name, tmp_path):
    """A checkpoint of torch.nn's model into one that was built empty; and weights that come when they are used."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install fastrnn[adoption]")
    saved, (input, _) = Tagger(name), batch()
    accelerate.Accelerator(cpu=True).save_model(saved, tmp_path)
    with accelerate.init_empty_weights():
        model = Tagger(name)
    fastrnn.convert(model)
    accelerate.load_checkpoint_and_dispatch(model, tmp_path, device_map={"": "cpu"})
    torch.testing.assert_close(model(input), saved(input))
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.rnn.weight_hh_l0.is_meta
    torch.testing.assert_close(model(input), saved(input))


# What torch.autograd.grad is asked for, of layers so large that it is worth asking back: the input, and which weights.
@pytest.mark.parametrize("of, weights", [("x", []), ("x", [0]), ("", [1, 3]), ("", [0, 5]), ("", range(8))])
@pytest.mark.parametrize("is_leaf", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_gradients_of_some(of, weights, bidirectional, is_leaf, device, monkeypatch):
    torch.manual_seed(0)
    factory = {"device": device, "dtype": torch.float64}
    ours, theirs = (library.GRU(128, 160, bidirectional=bidirectional, **factory) for library in (fastrnn, nn))
    theirs.load_state_dict(ours.state_dict())
    made, by_argument = [], autograd._gradients_by_argument  # whether gradients of weights were made, at each call

    def watch(gradients, needed):
        made.append(any(needed[1:3]))
        return by_argument(gradients, needed)

    monkeypatch.setattr(autograd, "_gradients_by_argument", watch)
    leaf, results = torch.randn(32, 32, 128, **factory, requires_grad=True), []
    for rnn in (ours, theirs):
        x, parameters = leaf if is_leaf else leaf.exp(), list(rnn.parameters())
        chosen = [x] * len(of) + [parameters[i] for i in weights if i < len(parameters)]
        loss = rnn(x)[0].square().sum()
        results.append(torch.autograd.grad(loss, chosen, retain_graph=True))
        loss.backward(inputs=[leaf])
        results[-1] += (leaf.grad,)
        leaf.grad = None
    assert_all_close(*results)
    directions = [any(i // 4 == d for i in weights) for d in range(1 + bidirectional)]
    assert sorted(made) == sorted(directions + [False] * len(directions))


def test_gradient_penalty_of_a_large_layer(device):
    """The gradient of the input alone, which depends on the weights."""
    torch.manual_seed(0)
    # In float32 torch.nn's LSTM has no second derivative on the CPU.
    factory = {"device": device, "dtype": torch.float64}
    ours, theirs = fastrnn.LSTM(128, 160, **factory), nn.LSTM(128, 160, **factory)
    theirs.load_state_dict(ours.state_dict())
    input, results = torch.randn(24, 32, 128, **factory, requires_grad=True), []
    for lstm in (ours, theirs):
        (gradient,) = torch.autograd.grad(lstm(input)[0].square().sum(), input, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), list(lstm.parameters())))
    assert_all_close(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_training(dtype, device):
    """autocast and GradScaler: the dtype of autocast inside, no overflow, and the loss goes down."""
    torch.manual_seed(0)
    model = Tagger("GRU").to(device)
    fastrnn.convert(model)
    seen = []
    model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    input, target = (t.to(device) for t in batch())
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype):
            loss = loss_of(model, input, target)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    # torch.nn's GRU hands h on in float32 under autocast on the CPU, and so does ours.
    assert set(seen) == {torch.float32 if device.type == "cpu" else dtype}
    assert losses[-1] < 0.9 * losses[0]
    assert scaler.get_scale() == 1024.0


# ---------------------------------------------------------------------------------------------------------------------
# Weights that are not plain Parameters


def weight_drop(module):
    """As AWD-LSTM does it: the parameter is renamed, a masked tensor takes its place."""
    raw = module.weight_hh_l0
    del module.weight_hh_l0
    module.register_parameter("weight_hh_l0_raw", raw)
    module.weight_hh_l0 = nn.functional.dropout(raw, 0.5, training=True)


def tie_layers(module):
    module.weight_hh_l1 = module.weight_hh_l0
    module.bias_ih_l1 = module.bias_ih_l0


CHANGES = {
    "weight_norm": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
    "old_weight_norm": lambda m: nn.utils.weight_norm(m, "weight_ih_l1"),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m, "weight_hh_l0").eval(),
    "old_spectral_norm": lambda m: nn.utils.spectral_norm(m, "weight_hh_l0").eval(),
    "orthogonal": lambda m: parametrizations.orthogonal(m, "weight_ih_l0"),
    "prune": lambda m: prune.l1_unstructured(m, "weight_hh_l0", 0.5),
    "weight_drop": weight_drop,
    "tied_layers": tie_layers,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_changed_weights(name, change, device):
    """Against torch.nn's own module called with the weights that the change results in; twice, with a step between."""
    torch.manual_seed(0)
    ours = getattr(fastrnn, name)(8, 8, num_layers=2).to(device, torch.float64)
    CHANGES[change](ours)
    theirs = getattr(nn, name)(8, 8, num_layers=2).to(device, torch.float64)
    input = torch.randn(5, 3, 8, device=device, dtype=torch.float64)
    for _ in range(2 if change != "weight_drop" else 1):
        output = ours(input)[0]
        weights = {key: getattr(ours, key) for key, _ in theirs.named_parameters()}
        expected = functional_call(theirs, weights, (input,))[0]
        torch.testing.assert_close(output, expected)
        parameters = list(ours.parameters())
        grads = [torch.autograd.grad(o.sin().sum(), parameters, retain_graph=True) for o in (output, expected)]
        assert_all_close(*grads)
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads[0], strict=True):
                parameter -= 0.1 * grad


@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_of_torch_nn_load(name, tmp_path):
    """Of a checkpoint that torch.nn wrote, with torch.load's safe mode, and of safetensors."""
    theirs, ours = getattr(nn, name)(3, 4, num_layers=2), getattr(fastrnn, name)(3, 4, num_layers=2)
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    ours.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    input = torch.randn(5, 2, 3)
    torch.testing.assert_close(ours(input)[0], theirs(input)[0])

    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors: pip install fastrnn[adoption]")
    safetensors.save_model(ours, tmp_path / "weights.safetensors")
    for module in (getattr(fastrnn, name)(3, 4, num_layers=2), getattr(nn, name)(3, 4, num_layers=2)):
        safetensors.load_model(module, tmp_path / "weights.safetensors")
        torch.testing.assert_close(module(input)[0], theirs(input)[0])


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_as_old_versions_of_torch_wrote_them(name, tmp_path):
    """In the format before 1.6, a plain dict without metadata; and a pickled module from before proj_size."""
    theirs, ours = getattr(nn, name)(3, 4, num_layers=2), getattr(fastrnn, name)(3, 4, num_layers=2)
    plain = dict(theirs.state_dict())
    torch.save(plain, tmp_path / "weights.pt", _use_new_zipfile_serialization=False)
    ours.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    input = torch.randn(5, 2, 3)
    torch.testing.assert_close(ours(input)[0], theirs(input)[0])

    attributes = theirs.__getstate__()
    del attributes["proj_size"]
    old = getattr(nn, name).__new__(getattr(nn, name))
    old.__setstate__(attributes)
    fastrnn.convert(old)
    torch.testing.assert_close(old(input)[0], theirs(input)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Threads and processes


@pytest.mark.parametrize("name", NAMES)
def test_many_threads_at_once(name, device):
    """Inference and training of one module; the kernels keep scratch memory by thread."""
    module = getattr(fastrnn, name)(16, 32, num_layers=2, device=device)
    inputs = torch.randn(32, 20, 4, 16, device=device)

    def run(input):
        with torch.inference_mode():
            inferred = module(input)[0].clone()
        leaf = input.clone().requires_grad_()
        return inferred, torch.autograd.grad(module(leaf)[0].sin().sum(), leaf)[0]

    expected = [run(input) for input in inputs]
    with ThreadPoolExecutor(8) as pool:
        for ours, alone in zip(pool.map(run, inputs), expected, strict=True):
            assert_all_close(ours, alone, rtol=0, atol=0)


class Features(Dataset):
    """A dataset that runs a module on each item."""

    def __init__(self):
        torch.manual_seed(0)
        self.module = fastrnn.GRU(3, 64)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        with torch.no_grad():
            return self.module(torch.full((20, 8, 3), float(index)))[1][0]


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.extended)])
def test_data_loader_workers(context):
    data = Features()
    expected = torch.stack([data[k] for k in range(4)])  # in this process, with its threads, before the fork
    loaded = torch.cat(list(DataLoader(data, 2, num_workers=2, multiprocessing_context=context, timeout=120)))
    torch.testing.assert_close(loaded, expected)


def train_shared(module):
    torch.set_num_threads(1)
    loss = module(torch.ones(3, 2, 3))[0].sum()
    for parameter, grad in zip(module.parameters(), torch.autograd.grad(loss, list(module.parameters())), strict=True):
        parameter.data -= grad


@pytest.mark.extended
def test_weights_in_shared_memory():
    """Hogwild: what a child process writes, this one sees."""
    torch.manual_seed(0)
    ours, alone = fastrnn.LSTM(3, 4), fastrnn.LSTM(3, 4)
    alone.load_state_dict(ours.state_dict())
    ours.share_memory()
    train_shared(alone)
    process = mp.get_context("spawn").Process(target=train_shared, args=(ours,))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert_all_close(list(ours.parameters()), list(alone.parameters()))


# ---------------------------------------------------------------------------------------------------------------------
# CUDA streams and graphs

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("name", NAMES)
def test_cuda_graphs(name):
    module = getattr(fastrnn, name)(16, 32, num_layers=2, device="cuda")
    inputs = torch.randn(4, 20, 8, 16, device="cuda")

    def run(function, input):
        leaf = input.clone().requires_grad_()
        return torch.autograd.grad(function(leaf)[0].sin().sum(), leaf)[0]

    expected = [run(module, input) for input in inputs]
    graphed = torch.cuda.make_graphed_callables(module, (torch.randn_like(inputs[0]).requires_grad_(),))
    assert_all_close([run(graphed, input) for input in inputs], expected)


@needs_cuda
@pytest.mark.parametrize("name", NAMES)
def test_cuda_streams(name):
    """Work is enqueued on the current stream, so streams of their own may run at once."""
    module = getattr(fastrnn, name)(16, 32, num_layers=2, device="cuda")
    inputs = torch.randn(8, 50, 8, 16, device="cuda")
    expected = [module(input)[0] for input in inputs]
    torch.cuda.synchronize()
    outputs = []
    for input in inputs:
        with torch.cuda.stream(torch.cuda.Stream()):
            outputs.append(module(input)[0])
    torch.cuda.synchronize()
    assert_all_close(outputs, expected, rtol=0, atol=0)
