"""How a fused model behaves in a training loop, and models, graphs and checkpoints of all kinds."""

import copy
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim.lr_scheduler import LambdaLR

from lowmem_optim import AdaLomo, AdamW, fuse_backward
from optim.fused import Net, adalomo
from optim.tensors import Unchanged, assert_same_bits, copies


def trained(make_model, fused=True, wrap=lambda model: model, steps=3, backward=None, **options):
    """The model after steps without ``optimizer.step()`` where fused."""
    model = make_model()
    optimizer = adalomo(model)
    handle = fuse_backward(model, optimizer, **options) if fused else None
    model = wrap(model)
    for step in range(steps):
        loss = model.loss(step)
        if fused and backward:
            backward(handle, loss)
        else:
            loss.backward()
        if not fused:
            optimizer.step()
            optimizer.zero_grad()
    return model


def test_step_and_zero_grad_do_nothing_and_schedulers_act():
    model, other = Net(), Net()
    optimizer, plain = adalomo(model), adalomo(other)
    schedulers = [LambdaLR(o, lambda step: 0.5**step) for o in (optimizer, plain)]
    fuse_backward(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a scheduler before any step
        for step in range(3):
            model.loss(step).backward()
            with Unchanged(optimizer):
                assert optimizer.step() is None
                optimizer.zero_grad()
            other.loss(step).backward()
            plain.step()
            plain.zero_grad()
            for scheduler in schedulers:
                scheduler.step()
    assert_same_bits(model.parameters(), other.parameters())


def test_schedulers_do_not_warn_where_step_is_never_called():
    model = Net()
    optimizer = adalomo(model)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    fuse_backward(model, optimizer)
    model.loss().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()


def test_closures_run_and_their_pass_is_the_update():
    model, other = Net(), trained(Net, steps=1)
    optimizer = adalomo(model)
    fuse_backward(model, optimizer)

    def closure():
        optimizer.zero_grad()
        loss = model.loss()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) > 0
    assert_same_bits(model.parameters(), other.parameters())


def test_step_makes_state_and_drops_gradients_that_were_set_by_hand():
    model = Net()
    optimizer = adalomo(model)
    fuse_backward(model, optimizer)
    before = copies(model.parameters())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    model.last.bias.grad = None
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    assert set(optimizer.state) == set(model.parameters()) - {model.last.bias}
    assert_same_bits(model.parameters(), before)


@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 0.1}, {"clip_grad_norm": 0.1, "loss_scale": "dynamic"}])
def test_distributed_checkpoint(options, tmp_path):
    """It makes state by a step with zero gradients and lr = 0, and keeps the running norm and the scale, too.

    A file only fills what the groups have: the second model has taken no pass.
    """

    def make():
        model = Net()
        optimizer = adalomo(model)
        return model, optimizer, fuse_backward(model, optimizer, **options)

    (model, optimizer, handle), (other, other_optimizer, other_handle) = make(), make()
    for step in range(3):
        handle.backward(model.loss(step))
    dcp.save(dict(zip("mo", get_state_dict(model, optimizer), strict=True)), checkpoint_id=tmp_path)
    state = dict(zip("mo", get_state_dict(other, other_optimizer), strict=True))
    dcp.load(state, checkpoint_id=tmp_path)
    set_state_dict(other, other_optimizer, model_state_dict=state["m"], optim_state_dict=state["o"])
    assert_same_bits(other.parameters(), model.parameters())
    for step in range(3, 6):
        handle.backward(model.loss(step))
        other_handle.backward(other.loss(step))
    assert_same_bits(other.parameters(), model.parameters())


def test_parameters_that_are_added_later():
    model, other = Net(), Net()
    optimizer, plain = (AdaLomo(list(m.parameters())[:4], lr=1e-2) for m in (model, other))
    fuse_backward(model, optimizer)
    for m, o in ((model, optimizer), (other, plain)):
        for step in range(4):
            if step == 2:
                o.zero_grad()
                m.zero_grad()
                o.add_param_group({"params": list(m.parameters())[4:]})
            m.loss(step).backward()
            o.step()
            o.zero_grad()
    assert_same_bits(model.parameters(), other.parameters())


def test_copies_are_not_fused():
    model = Net()
    optimizer = adalomo(model)
    fuse_backward(model, optimizer)
    model.loss().backward()
    other, other_optimizer = copy.deepcopy((model, optimizer))
    before = copies(other.parameters())
    other.loss().backward()
    assert_same_bits(other.parameters(), before)
    other_optimizer.step()
    model.loss().backward()
    assert_same_bits(other.parameters(), model.parameters())


def test_a_learning_rate_on_the_device():
    model, other = Net(), Net()
    optimizer, plain = adalomo(model, capturable=True), adalomo(other, lr=torch.tensor(1e-2))
    fuse_backward(model, optimizer, clip_grad_norm=1e6)
    for step in range(3):
        model.loss(step).backward()
        other.loss(step).backward()
        plain.step()
        plain.zero_grad()
        for o in (optimizer, plain):
            o.param_groups[0]["lr"].mul_(0.5)
    assert_same_bits(model.parameters(), other.parameters())


# models


@pytest.mark.parametrize("make", [Net, lambda: Net(tied=True), lambda: Net(tied=True, reentrant=False)])
@pytest.mark.parametrize("exact", [False, True])
def test_tied_weights_and_checkpointing(make, exact):
    """A tied weight gets its whole gradient at once; recomputing uses weights before the update."""
    fused = trained(make, backward=lambda handle, loss: handle.backward(loss, exact=exact))
    assert_same_bits(fused.parameters(), trained(make, fused=False).parameters())


@pytest.mark.parametrize("last", [True, False])
def test_reentrant_checkpointing_without_sharing(last):
    """Every segment is a backward pass of its own; with no parameter outside, step() tells where the pass ends."""

    def make():
        model = Net(reentrant=True)
        model.last.requires_grad_(last)
        return model

    model = make()
    optimizer = adalomo(model)
    handle = fuse_backward(model, optimizer, clip_grad_norm=1e6)
    for step in range(3):
        model.loss(step).backward()
        optimizer.step()
        assert handle.grad_norm() > 0
    assert_same_bits(model.parameters(), trained(make, fused=False).parameters())
    assert_same_bits(
        trained(make, backward=lambda handle, loss: handle.backward(loss, exact=True)).parameters(), model.parameters()
    )


def test_reentrant_checkpointing_of_a_shared_weight_is_refused():
    model = Net(tied=True, reentrant=True)
    optimizer = adalomo(model)
    fuse_backward(model, optimizer)
    with pytest.raises(RuntimeError, match=r"'first.weight' got a second gradient .* use_reentrant=False"):
        model.loss().backward()
    # nothing of it is left
    optimizer.zero_grad()
    model.reentrant = False
    model.loss().backward()


def test_two_optimizers_of_a_model_each_with_its_handle():
    model, other = Net(), Net()
    for m, fused in ((model, True), (other, False)):
        optimizers = [AdaLomo(m.first.parameters(), lr=1e-2), AdamW([*m.second.parameters(), *m.last.parameters()])]
        handles = [fuse_backward(m, o) for o in optimizers] if fused else []
        for step in range(3):
            m.loss(step).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert len(handles) == (2 if fused else 0)
    assert_same_bits(model.parameters(), other.parameters())


@pytest.mark.parametrize("order", ["fused-then-compiled", "compiled-then-fused"])
def test_compiled_models(order):
    def compiled(model):
        model.forward = torch.compile(model.forward, backend="aot_eager")
        return model

    make = (lambda: compiled(Net())) if order == "compiled-then-fused" else Net
    wrap = compiled if order == "fused-then-compiled" else (lambda model: model)
    # dropout of a compiled model draws other numbers
    models = [trained(make, wrap=lambda m: wrap(m).eval()), trained(make, fused=False, wrap=lambda m: wrap(m).eval())]
    assert_same_bits(models[0].parameters(), models[1].parameters())


def test_autocast():
    def make():
        model = Net()
        plain_loss = model.loss

        def loss(step):
            with torch.autocast("cpu", torch.bfloat16):
                return plain_loss(step).float()

        model.loss = loss
        return model

    assert_same_bits(trained(make).parameters(), trained(make, fused=False).parameters())


# what autograd does besides


def test_a_second_pass_through_a_kept_graph_is_refused_by_torch():
    """Parameters have changed, and their versions say so."""
    model = Net()
    fuse_backward(model, adalomo(model))
    loss = model.loss()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_two_losses_of_one_graph_accumulate():
    model, other = Net(), Net()
    optimizer, plain = adalomo(model), adalomo(other)
    handle = fuse_backward(model, optimizer)
    loss = model.loss()
    with handle.accumulate():
        loss.backward(retain_graph=True)
    (loss * 2).backward()
    loss = other.loss()
    loss.backward(retain_graph=True)
    (loss * 2).backward()
    plain.step()
    assert_same_bits(model.parameters(), other.parameters())


def test_asked_whether_to_accumulate():
    model = Net()
    accumulates = True
    optimizer = adalomo(model)
    fuse_backward(model, optimizer, accumulating=lambda: accumulates)
    before = copies(model.parameters())
    model.loss().backward()
    assert_same_bits(model.parameters(), before)
    with pytest.raises(RuntimeError, match="micro-batches that nothing has used"):
        optimizer.step()
    accumulates = False
    model.loss().backward()
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    accumulates = True
    model.loss().backward()
    optimizer.zero_grad()
    optimizer.step()


def test_gradients_with_a_graph_are_refused_and_penalties_of_gradients_work():
    model = Net()
    optimizer = adalomo(model)
    fuse_backward(model, optimizer)
    with Unchanged(optimizer), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of the cycle that create_graph makes
        with pytest.raises(RuntimeError, match=r"backward\(create_graph=True\) on a fused model"):
            model.loss().backward(create_graph=True)
    model.zero_grad()
    grads = torch.autograd.grad(model.loss(), list(model.parameters()), create_graph=True)
    before = copies(model.parameters())
    torch.stack([g.square().sum() for g in grads]).sum().backward()
    assert not torch.equal(model.first.weight, before[0])


def test_an_error_in_a_pass_leaves_a_usable_handle():
    model = Net()
    optimizer = adalomo(model)
    handle = fuse_backward(model, optimizer)

    def fail(grad):
        raise ValueError("from a hook")

    hook = model.first.bias.register_hook(fail)
    with pytest.raises(ValueError, match="from a hook"):
        handle.backward(model.loss())
    with pytest.raises(ValueError, match="from a hook"):
        model.loss().backward()
    hook.remove()
    optimizer.zero_grad()
    before = copies(model.parameters())
    model.loss().backward()
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
