"""What processes with shards do besides equal numbers: models that FSDP2 shards, copies, skipped steps, refusals."""

import copy
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lowmem_kernels.numerics import parity_tolerance
from lowmem_optim import SWAN, AdamMini, AdamW, AdaPM, Lomo, fuse_backward, owners
from lowmem_optim.sharding import local_of
from optim.cases import exported
from optim.sharded import CHECKPOINTED, distributed, gradients, starts
from optim.tensors import assert_same_bits, copies

ROWS = (Shard(0),)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3, bias=False)).bfloat16()


def trained(model, make, steps=4):
    """Every process has the same data: the average of equal gradients of 2 or 4 processes has their bits."""
    optimizer = make(model.named_parameters())
    for step in range(steps):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).bfloat16()
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def models_that_fsdp_shards(size):
    makes = [lambda params: AdamW(params, lr=1e-2), lambda params: Lomo(params, lr=1e-1)]
    meshes = [init_device_mesh("cpu", (size,))]
    meshes += [init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))] if size == 4 else []
    for make in makes:
        expected = trained(net(), make)
        for mesh in meshes:
            model = net()
            for layer in (model[0], model[3], model):
                fully_shard(layer, mesh=mesh)
            assert_same_bits(trained(model, make), expected)


def models_with_tensor_parallel_and_fsdp():
    """Placements as PyTorch makes them, _StridedShard among them; sums over tensor-parallel processes differ in order.

    The norm is on the data dimension of the mesh only, which costs a collective of its own.
    """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3), nn.LayerNorm(3))

    def run(model):
        optimizer = Lomo(model.parameters(), lr=1e-1, clip_grad_norm=0.05)
        for step in range(4):
            x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
            (model(x) - x[:, :3]).square().mean().backward()
            with CommDebugMode() as collectives:
                optimizer.step()
            optimizer.zero_grad()
        return collectives.get_total_counts()

    whole, model = make(), make()
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    assert any("_StridedShard" in str(p.placements[0].__class__) for p in model.parameters())
    run(whole)
    assert run(model) == 2
    for p, q in zip(whole.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.full_tensor(), p.detach(), rtol=1e-5, atol=1e-6)


def sharded_optimizer(mesh, placements=ROWS, make=AdamW, **options):
    params = [nn.Parameter(distributed(p, mesh, placements)) for p in starts(torch.bfloat16)]
    return params, make(params, lr=1e-2, **options)


def give(params, step, mesh, placements=ROWS):
    for param, grad in zip(params, gradients(step, torch.bfloat16), strict=True):
        param.grad = distributed(grad, mesh, placements)


def locals_of(params):
    return [p.to_local().detach().clone() for p in params]


def copies_and_loaded_states_carry_on(mesh, config):
    params, optimizer = sharded_optimizer(mesh, make=config.optimizer, **config.options, seed=4)
    plain = [nn.Parameter(p) for p in starts(torch.bfloat16)]
    whole = config.optimizer(plain, lr=1e-2, **config.options, seed=4)
    for step in range(2):
        give(params, step, mesh)
        optimizer.step()
        for param, grad in zip(plain, gradients(step, torch.bfloat16), strict=True):
            param.grad = grad
        whole.step()
    twins, twin = copy.deepcopy((params, optimizer))
    runs = [(params, optimizer), (twins, twin)]
    for state in (optimizer.state_dict(), whole.state_dict()):
        others, other = sharded_optimizer(mesh, make=config.optimizer, **config.options)
        for a, b in zip(others, params, strict=True):
            a.to_local().detach().copy_(b.to_local())
        other.load_state_dict(state)
        runs.append((others, other))
    for some, one in runs:
        give(some, 2, mesh)
        one.step()
    for some, one in runs[1:]:
        assert_same_bits(locals_of(some), locals_of(params))
        for a, b in zip(some, params, strict=True):
            state, expected = one.state[a], optimizer.state[b]
            assert state.keys() == expected.keys()
            assert state["uid"] == expected["uid"]
            assert [type(v) for v in state.values()] == [type(expected[k]) for k in state]
    # a matrix whose state goes along with all of it
    if any(isinstance(v, DTensor) for v in optimizer.state[params[0]].values()):
        with pytest.raises(ValueError, match=r"exp_avg\w* of parameter 0 is a DTensor on .*; allowed: whole tensors"):
            whole.load_state_dict(optimizer.state_dict())


def rounds_make_no_difference(mesh):
    """Each of four matrices in a round of its own, of two collectives, in two steps."""
    ends, counts = [], []
    for size in (owners.ROUND_BYTES, 1):
        params, optimizer = sharded_optimizer(mesh, make=SWAN, seed=4)
        with mock.patch.object(owners, "ROUND_BYTES", size), CommDebugMode() as collectives:
            for step in range(2):
                give(params, step, mesh)
                optimizer.step()
        ends.append(locals_of(params))
        counts.append(collectives.get_total_counts())
    assert_same_bits(*ends)
    assert counts == [4, 16]


def bytes_that_move(rank, mesh, size):
    """Of matrices of which each process owns one: of the others' it sends its part of parameter and gradient, and of
    its own all other parts of the parameter back, with the step (16 bytes in a buffer)."""
    params = [nn.Parameter(distributed(torch.ones(64, 32).bfloat16(), mesh, ROWS)) for _ in range(size)]
    optimizer = SWAN(params, lr=1e-2)
    for param in params:
        param.grad = distributed(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16(), mesh, ROWS)
    with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as moved:
        optimizer.step()
    part = 64 * 32 * 2 // size
    sent = [[n for i, n in enumerate(call.args[3]) if i != rank] for call in moved.call_args_list]
    assert sent == [[2 * part] * (size - 1), [part + 16] * (size - 1)]


def all_skip_together(rank, mesh, size):
    """Also where a copy is bad that is not the first, which alone counts in the norm."""
    skips = {"skip_nonfinite": "step"}
    for options, where, placed in ((skips, "grad", ROWS), (skips, "grad", (Replicate(),)), ({}, "found_inf", ROWS)):
        params, optimizer = sharded_optimizer(mesh, placed, **options)
        give(params, 0, mesh, placed)
        optimizer.step()
        before, states = locals_of(params), copy.deepcopy([optimizer.state[p] for p in params])
        give(params, 1, mesh, placed)
        if where == "grad" and rank == size - 1:
            params[0].grad.to_local()[0, 0] = float("nan")
        if where == "found_inf":
            optimizer.found_inf = torch.tensor(float(rank == size - 1))
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
            optimizer.step()
        assert [call.args[0].nbytes for call in reduced.call_args_list] == [16]
        assert_same_bits(locals_of(params), before)
        assert all(optimizer.state[p]["step"] == s["step"] == 1 for p, s in zip(params, states, strict=True))
        assert optimizer.nonfinite_count() == (where == "grad")


def a_bad_gradient_stops_its_parameter_in_all_processes(rank, mesh, size, config):
    """Where the update needs the whole parameter: neither it nor its state moves, in any process, and others do."""
    params, optimizer = sharded_optimizer(mesh, make=config.optimizer, **config.options)
    give(params, 0, mesh)
    optimizer.step()
    before, states = locals_of(params), copy.deepcopy([optimizer.state[p] for p in params])
    give(params, 1, mesh)
    if rank == size - 1:
        params[0].grad.to_local()[0, 0] = float("nan")
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, locals_of(params), strict=True) if a.numel()]
    assert not moved[0]
    assert any(moved)
    for key, value in optimizer.state[params[0]].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(local_of(value), local_of(states[0][key])), key


def a_grad_scaler_skips_in_all_processes(rank, mesh):
    scaler, model = torch.amp.GradScaler("cpu"), net().float()
    fully_shard(model, mesh=mesh)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    for bad in (False, True):
        scaler.scale(model(torch.ones(4, 5)).square().mean()).backward()
        before = locals_of(model.parameters())
        if bad and rank == 1:
            model[0].weight.grad.to_local()[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0 ** (15 if bad else 16)
        same = [torch.equal(a, b) for a, b in zip(before, locals_of(model.parameters()), strict=True) if a.numel()]
        assert all(same) if bad else not any(same)


def whole_parameters_among_shards(mesh):
    """Of equal values in all processes, they count once in the norm; with a bad gradient in one of them all skip."""
    plain = [nn.Parameter(p.float()) for p in starts(torch.bfloat16)]
    mixed = [nn.Parameter(distributed(p.data, mesh, ROWS) if i % 2 else p.data.clone()) for i, p in enumerate(plain)]
    runs = [(params, Lomo(params, lr=0.1, clip_grad_norm=0.5)) for params in (plain, mixed)]
    for step in range(3):
        for params, optimizer in runs:
            for param, grad in zip(params, gradients(step, torch.float32), strict=True):
                param.grad = distributed(grad, mesh, ROWS) if isinstance(param, DTensor) else grad
            optimizer.step()
    for start, a, b in zip(starts(torch.bfloat16), plain, mixed, strict=True):
        found = b.full_tensor() if isinstance(b, DTensor) else b
        assert (found - a).norm() <= parity_tolerance(start, a, 3)
    before = [local_of(p).detach().clone() for p in mixed]
    if mesh.get_local_rank() == 0:
        mixed[0].grad[0, 0] = float("inf")
    runs[1][1].step()
    assert_same_bits([local_of(p).detach() for p in mixed], before)


def a_gradient_in_no_process_skips_no_collective(mesh):
    _, optimizer = sharded_optimizer(mesh, skip_nonfinite="step")
    with CommDebugMode() as collectives:
        optimizer.step()
    assert collectives.get_total_counts() == 1
    assert not optimizer.state


def placements_that_are_refused(mesh):
    params, optimizer = sharded_optimizer(mesh)
    before = copies([p.to_local() for p in params])
    give(params, 0, mesh)
    params[-3].grad = DTensor.from_local(torch.ones(5).bfloat16(), mesh, [Partial()])
    with pytest.raises(TypeError, match=r"the gradient of 5 is a DTensor with \(Partial.*; allowed: a DTensor with"):
        optimizer.step()
    assert_same_bits(locals_of(params), before)
    assert not optimizer.state
    partial = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]))
    with pytest.raises(
        TypeError, match=r"a parameter is a DTensor with Partial.*; allowed: Shard, _StridedShard, Replicate"
    ):
        AdamW([partial])


def fused_backward_has_the_bits_of_a_step(mesh):
    """Every optimizer, with gradients gone after the pass; the first micro-batch only accumulates."""
    for make in exported().values():
        ends = []
        for fused in (False, True):
            model = net()
            for layer in (model[0], model[3], model):
                fully_shard(layer, mesh=mesh)
            optimizer = make(model.named_parameters())
            handle = fuse_backward(model, optimizer) if fused else None
            for step in range(4):
                x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).bfloat16()
                with handle.accumulate() if fused and step == 0 else nullcontext():
                    model(x).float().square().mean().backward()
                if step > 0:
                    assert not fused or all(p.grad is None for p in model.parameters())
                    optimizer.step()
                    optimizer.zero_grad()
            ends.append(locals_of(model.parameters()))
            assert all(optimizer.state[p]["step"] == 3 for p in model.parameters())
        assert_same_bits(*ends)


def fused_backward_refuses_norms(mesh):
    model = net()
    fully_shard(model, mesh=mesh)
    optimizer = AdamW(model.named_parameters())
    for name, value in (("clip_grad_norm", 1.0), ("clip_param_norm", 1.0), ("loss_scale", "dynamic")):
        with pytest.raises(ValueError, match=f"{name} is {value!r} and parameters are DTensors; allowed: None, or"):
            fuse_backward(model, optimizer, **{name: value})
    handle = fuse_backward(model, optimizer)
    with pytest.raises(ValueError, match="exact is True and parameters are DTensors"):
        handle.backward(model(torch.ones(1, 5).bfloat16()).sum(), exact=True)


def autograd_sees_the_update(mesh):
    """A backward pass through a parameter that a step has changed meanwhile raises, as torch.optim's do."""
    param = nn.Parameter(distributed(torch.ones(4, 4), mesh, (Replicate(),)))
    optimizer = AdamW([param], lr=0.1)
    loss = (param * param).sum()
    param.grad = distributed(torch.ones(4, 4), mesh, (Replicate(),))
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def run(rank, size):
    mesh = init_device_mesh("cpu", (size,))
    models_that_fsdp_shards(size)
    if size == 4:
        models_with_tensor_parallel_and_fsdp()
    for config in CHECKPOINTED:
        copies_and_loaded_states_carry_on(mesh, config)
        if config.optimizer not in (AdamW, Lomo, AdamMini, AdaPM):
            a_bad_gradient_stops_its_parameter_in_all_processes(rank, mesh, size, config)
    rounds_make_no_difference(mesh)
    bytes_that_move(rank, mesh, size)
    all_skip_together(rank, mesh, size)
    a_grad_scaler_skips_in_all_processes(rank, mesh)
    whole_parameters_among_shards(mesh)
    a_gradient_in_no_process_skips_no_collective(mesh)
    placements_that_are_refused(mesh)
    fused_backward_has_the_bits_of_a_step(mesh)
    fused_backward_refuses_norms(mesh)
    autograd_sees_the_update(mesh)
