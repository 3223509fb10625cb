"""One of the processes that hold shards of parameters: python sharded_worker.py RANK PROCESSES FOLDER.

Process 0 writes the table of what works into FOLDER/table-PROCESSES.md. Two processes leave checkpoints there, from
which four, and three of them, carry on.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard

import optim.sharded_checks as checks
import optim.worker as worker
from lowmem_optim.sharding import local_of
from optim.cases import exported
from optim.sharded import (
    CHECKPOINTED,
    CONFIGS,
    Model,
    assert_same_numbers,
    carries_on,
    distributed,
    gradients,
    starts,
    state_dicts,
)
from optim.tensors import assert_same_bits, copies, same_bits

RANK, SIZE, FOLDER = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
STEPS = 20

LINE = {
    "Shard(0)": (Shard(0),),
    "Shard(1)": (Shard(1),),
    "Replicate": (Replicate(),),
    "_StridedShard(0)": (_StridedShard(0, split_factor=2),),
}
SQUARE = {
    "Replicate, Shard(0)": (Replicate(), Shard(0)),
    "Shard(0), Shard(0)": (Shard(0), Shard(0)),
    "Shard(0), Shard(1)": (Shard(0), Shard(1)),
    "_StridedShard(0), Shard(0)": (_StridedShard(0, split_factor=2), Shard(0)),
}


def placements_and_meshes():
    line = init_device_mesh("cpu", (SIZE,))
    names = LINE if SIZE == 2 else ("Shard(0)", "Shard(1)")
    yield from ((name, line, LINE[name]) for name in names)
    if SIZE == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
        yield from ((name, square, placements) for name, placements in SQUARE.items())


#: By these AdaPM cuts the first two into three slices and three of a stack, and finds a query and an MLP.
NAMES = [
    "0.attn.c_attn.weight",
    "1.attn.c_attn.weight",
    "mlp.up_proj.weight",
    "attn.q_proj.weight",
    "4",
    "b.bias",
    "6",
    "7",
]


def named(params):
    """(name, parameter) pairs."""
    return [*zip(NAMES, params, strict=True)]


def whole_run(config):
    """Parameters and states of a single process."""
    params = [nn.Parameter(p) for p in starts(config.dtype)]
    optimizer = config.make(named(params))
    for step in range(STEPS):
        for param, grad in zip(params, gradients(step, config.dtype), strict=True):
            param.grad = grad
        optimizer.step()
    return copies(params), [optimizer.state[p] for p in params]


def sharded_run(config, mesh, placements):
    """The same of shards, put together again, and collectives of a step."""
    params = [nn.Parameter(distributed(p, mesh, placements)) for p in starts(config.dtype)]
    optimizer = config.make(named(params))
    optimizer.init_state()
    for step in range(STEPS):
        for param, grad in zip(params, gradients(step, config.dtype), strict=True):
            param.grad = distributed(grad, mesh, placements)
        with CommDebugMode() if step == STEPS - 1 else nullcontext() as collectives:
            optimizer.step()
    buckets = [b for b in optimizer._buckets() if b.in_pieces]
    on_owners = [b for b in buckets if not optimizer.takes_pieces(b)]
    by_rows = [b for b in buckets if config.row_sums and b.pieces() is not None and b not in on_owners]
    by_rows = [b for b in by_rows if b.rule != "adamw"]
    counts = {str(op).rpartition(".")[2]: count for op, count in collectives.get_comm_counts().items()}
    expected = {"alltoall_base_": 2 * len(on_owners), "allreduce_": config.all_reduces + config.row_sums * len(by_rows)}
    assert counts == {name: count for name, count in expected.items() if count}, config.name
    for param in params:
        tensors = [value for value in optimizer.state[param].values() if isinstance(value, torch.Tensor)]
        # all that is not a number is a DTensor on the parameter's mesh
        assert all(isinstance(t, DTensor) == (t.ndim > 0) for t in tensors)
        assert all(local_of(t).is_contiguous() for t in tensors)
    whole = [p.detach().full_tensor() for p in params]
    states = [
        {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in optimizer.state[p].items()} for p in params
    ]
    return whole, states, config.same_bits and not by_rows


def same_in_all_processes(tensors):
    flat = torch.cat([t.float().flatten() for t in tensors])
    everywhere = [torch.empty_like(flat) for _ in range(SIZE)]
    dist.all_gather(everywhere, flat)
    assert_same_bits(everywhere, [flat] * SIZE)


def equals_one_process(rows):
    """Without sums over processes all bits are the same; with them, float32 within the project's tolerance."""
    assert {config.optimizer for config in CONFIGS} == set(exported().values())
    references = {config.name: whole_run(config) for config in CONFIGS}
    for name, mesh, placements in placements_and_meshes():
        for config in CONFIGS:
            expected, states = references[config.name]
            found, others, bits = sharded_run(config, mesh, placements)
            if bits:
                assert_same_bits(found, expected)
                for state, other in zip(states, others, strict=True):
                    assert state.keys() == other.keys()
                    assert all(same_bits(torch.as_tensor(state[k]), torch.as_tensor(other[k])) for k in state)
            else:
                assert_same_numbers(found, expected, starts(config.dtype), STEPS)
                # of copies, each group of processes has put together its own
                same_in_all_processes([*found, *(v for s in others for k, v in sorted(s.items()) if k != "uid")])
            rows.setdefault(config.name, {})[name] = "same bits" if bits else "within tolerance"


def leaves_checkpoints():
    for config in CHECKPOINTED:
        model = Model(init_device_mesh("cpu", (2,)), (Shard(0),))
        optimizer = config.make(model.named_parameters())
        for step in range(3):
            model.step(optimizer, step)
        dcp.save(state_dicts(model, optimizer), checkpoint_id=FOLDER / config.name)
        for step in range(3, 6):
            model.step(optimizer, step)
        ends = [p.full_tensor() for p in model.parameters()]
        if RANK == 0:
            torch.save(ends, FOLDER / f"{config.name}.pt")


def all_carry_on(mesh, placements, group=None):
    for config in CHECKPOINTED:
        carries_on(config, FOLDER, mesh, placements, process_group=group)


def carries_on_elsewhere():
    all_carry_on(init_device_mesh("cpu", (4,)), (Shard(1),))
    all_carry_on(init_device_mesh("cpu", (2, 2)), (Replicate(), Shard(0)))
    group = dist.new_group([0, 1, 2])
    mesh = DeviceMesh("cpu", [0, 1, 2])
    if RANK < 3:
        all_carry_on(mesh, (Shard(0),), group)


def write_table(rows):
    names = list(next(iter(rows.values())))
    lines = [f"| {SIZE} processes | {' | '.join(f'`{n}`' for n in names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {row} | {' | '.join(cells[n] for n in names)} |" for row, cells in rows.items()]
    (FOLDER / f"table-{SIZE}.md").write_text("\n".join(lines) + "\n")


def main():
    rows: dict[str, dict[str, str]] = {}
    equals_one_process(rows)
    if RANK == 0:
        write_table(rows)
    if SIZE == 2:
        leaves_checkpoints()
    else:
        carries_on_elsewhere()
    checks.run(RANK, SIZE)


if __name__ == "__main__":
    worker.run(main, RANK, SIZE, meeting=FOLDER / f"meeting-{SIZE}")
