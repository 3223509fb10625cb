"""What cannot be updated in the backward pass is refused, with the reason and before anything changes."""

import copy

import pytest
import torch
from torch import nn

from lowmem_optim import Lomo, fuse_backward
from optim.fused import Net, Weights, adalomo
from optim.tensors import SMALL, Unchanged, assert_same_bits, assert_same_values, copies


def test_a_grad_scaler_is_refused():
    model = Net()
    optimizer = adalomo(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with pytest.raises(
        TypeError, match=r"loss_scale is a GradScaler; a GradScaler unscales gradients in optimizer\.step"
    ):
        fuse_backward(model, optimizer, loss_scale=scaler)

    class Wrapped:
        def __init__(self):
            self.optimizer, self.scaler = optimizer, scaler

    with pytest.raises(TypeError, match="optimizer has a GradScaler"):
        fuse_backward(model, Wrapped())
    fuse_backward(model, optimizer)
    scaler.scale(model.loss()).backward()
    with pytest.raises(RuntimeError, match="was stepped by a GradScaler; a GradScaler unscales"):
        scaler.step(optimizer)
    optimizer.step()


def test_a_scaled_loss_has_to_go_through_the_handle():
    model = Net()
    optimizer = adalomo(model)
    fuse_backward(model, optimizer, loss_scale=2.0)
    with Unchanged(optimizer), pytest.raises(RuntimeError, match=r"there is a loss_scale; allowed: handle.backward"):
        model.loss().backward()


def test_skipping_whole_steps_takes_two_passes():
    model = Net()
    optimizer = adalomo(model, skip_nonfinite="step")
    handle = fuse_backward(model, optimizer)
    with Unchanged(optimizer), pytest.raises(RuntimeError, match="skip_nonfinite is 'step'"):
        model.loss().backward()
    optimizer.zero_grad()
    before = copies(model.parameters())
    handle.backward(model.loss() * float("nan"), exact=True)
    assert_same_bits(model.parameters(), before)
    handle.backward(model.loss(), exact=True)
    assert not torch.equal(model.first.weight, before[0])


def test_sparse_gradients_are_refused():
    model = nn.Embedding(4, 3, sparse=True)
    fuse_backward(model, adalomo(model))
    with pytest.raises(RuntimeError, match=r"the gradient of 'weight' is torch.sparse_coo; allowed: dense gradients"):
        model(torch.tensor([1])).sum().backward()


class FullyShardedDataParallel(nn.Linear):
    """Goes by the name of torch's."""


def test_what_cannot_be_fused():
    model = Net()
    optimizer = adalomo(model)
    with pytest.raises(TypeError, match="optimizer is a SGD; allowed: an optimizer of lowmem_optim"):
        fuse_backward(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match=r"optimizer has 4 parameters that are none of the model's, 'second.weight'"):
        fuse_backward(model.first, optimizer)
    sharded = FullyShardedDataParallel(2, 2)
    with pytest.raises(TypeError, match="model is a FullyShardedDataParallel"):
        fuse_backward(sharded, adalomo(sharded))
    handle = fuse_backward(model, optimizer)
    with pytest.raises(ValueError, match="optimizer is fused already"):
        fuse_backward(model, optimizer)
    handle.remove()
    handle.remove()
    fuse_backward(model, optimizer).remove()


@pytest.mark.filterwarnings("ignore")
def test_callbacks_refuse_what_they_cannot_do():
    from lowmem_optim.integrations import lightning, transformers

    class Several:
        world_size, n_gpu, optimizers = 2, 1, [1, 2]

    with pytest.raises(RuntimeError, match="the Trainer has 2 processes with 1 devices each; allowed: one of one"):
        transformers.FuseBackwardCallback().on_train_begin(Several, None, None, model=None, optimizer=None)
    with pytest.raises(RuntimeError, match="the module has 2 optimizers; allowed: one"):
        lightning.FuseBackwardCallback().on_train_start(Several, None)

    class Scaled:
        optimizers, precision = [1], "16-mixed"

        class precision_plugin:
            scaler = torch.amp.GradScaler("cpu")

    with pytest.raises(TypeError, match="precision is '16-mixed'; a GradScaler unscales"):
        lightning.FuseBackwardCallback().on_train_start(Scaled, None)


def test_a_checkpoint_of_a_fused_optimizer_loads_without_the_handle():
    model = Weights(names=SMALL)
    optimizer = Lomo(list(model.named_parameters()))
    handle = fuse_backward(model, optimizer, clip_grad_norm=1.0)
    handle.backward(model.loss(0))
    saved = copy.deepcopy(optimizer.state_dict())
    handle.remove()
    other = Lomo(list(Weights(names=SMALL).named_parameters()))
    other.load_state_dict(saved)
    assert_same_values(other.param_groups[0]["fused_norm"], optimizer.param_groups[0]["fused_norm"])
    # and groups of it make another optimizer
    Lomo([{k: v for k, v in group.items()} for group in optimizer.param_groups])
