"""Rules as one would write them from their papers: what `lowmem bench` compares ours with.

Matrices only, one after the other, in the gradient's dtype where ports keep it there; others get torch's AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

SMALLEST = 1e-8  # what ports bound norms by


class EagerMatrices(Optimizer):
    """A rule for matrices, one after the other; torch's AdamW with ``others_lr`` for all else."""

    def __init__(self, params: Iterable[nn.Parameter], defaults: dict[str, Any], others_lr: float) -> None:
        super().__init__(params, defaults)
        others = [p for group in self.param_groups for p in group["params"] if p.ndim != 2]
        self.others = torch.optim.AdamW(others, lr=others_lr, fused=True) if others else None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters once."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.ndim == 2 and param.grad is not None:
                    self._update(param, param.grad, self.state[param], group)
        if self.others is not None:
            self.others.step()

    def _update(self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Update one matrix in place."""
        raise NotImplementedError


class EagerOptimizer(EagerMatrices):
    """``p -= lr scale X`` for matrices, with X of their gradient by ``normalize``; AdamW for all else."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        normalize: Callable[[Tensor], Tensor],
        lr: float = 0.02,
        scale: float = 0.05,
    ) -> None:
        super().__init__(params, {"lr": lr, "scale": scale}, others_lr=lr * scale)
        self.normalize = normalize

    def _update(self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        param.sub_(self.normalize(grad), alpha=group["lr"] * group["scale"])


class EagerAdaPM(EagerMatrices):
    """AdaPM with a low-rank momentum for matrices: A, the momentum and the residual are made; AdamW for all else."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 1e-3, rank: int = 16) -> None:
        defaults = {"lr": lr, "rank": rank, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        super().__init__(params, defaults, others_lr=lr)

    def _update(self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        (beta1, beta2), g = group["betas"], grad.float()
        if not state:
            rank = min(group["rank"], *param.shape)
            state["left"] = g.new_zeros(len(g), rank)
            state["right"] = torch.linalg.qr(torch.randn_like(g[:rank]).T)[0].T
            state["exp_avg_sq"], state["step"] = torch.zeros_like(g), 0
        state["step"] += 1
        a = (beta1 * state["left"] @ state["right"]).add_(g, alpha=1 - beta1)
        q = torch.linalg.qr(a @ state["right"].T)[0]
        right, scale = torch.linalg.qr((q.T @ a).T)
        state["left"], state["right"] = q @ scale.T, right.T
        momentum = state["left"] @ state["right"]
        update = momentum / (1 - beta1 ** state["step"]) + (a - momentum) / (1 - beta1)
        v = state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update /= (v / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        param.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.clamp_(-3, 3), alpha=group["lr"])


def sinkhorn(grad: Tensor, iterations: int = 5) -> Tensor:
    """SinkGD's X (arXiv 2502.06742, algorithm 3)."""
    n, m = grad.shape
    x = grad
    for _ in range(iterations):
        x = x * (sqrt(m) / x.norm(dim=1, keepdim=True).clamp(min=SMALLEST))
        x = x * (sqrt(n) / x.norm(dim=0, keepdim=True).clamp(min=SMALLEST))
    return x


def whitened(grad: Tensor, iterations: int = 10, beta: float = 0.8) -> Tensor:
    """SWAN's X (arXiv 2412.13148): rows standardized, then whitened by Newton and Schulz's iteration, in float32."""
    x = grad.float()
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, correction=0).clamp(min=SMALLEST)
    y = x @ x.mT
    y = y / y.norm()
    z = torch.eye(len(y), dtype=y.dtype, device=y.device)
    three = 3 * z
    for _ in range(iterations):
        t = three - z @ y
        y = beta * y @ t
        z = beta * t @ z
    d = z @ x
    return (d * (sqrt(d.numel()) / d.norm())).to(grad.dtype)


class EagerApollo(EagerMatrices):
    """APOLLO for matrices (arXiv 2412.05270, algorithm 1), with a projection that is kept; AdamW for all else."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        rank: int = 256,
        scale_type: str = "channel",
        scale: float = 1.0,
        update_proj_gap: int = 200,
        lr: float = 0.01,
    ) -> None:
        defaults = {
            "rank": rank,
            "scale_type": scale_type,
            "scale": scale,
            "update_proj_gap": update_proj_gap,
            "lr": lr,
        }
        super().__init__(params, defaults, others_lr=lr)

    def _update(self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        right = grad.shape[0] >= grad.shape[1]
        step = state.get("step", 0)
        if step % group["update_proj_gap"] == 0:
            contracted = min(grad.shape)
            rank = min(group["rank"], contracted)
            state["projection"] = torch.randn(rank, contracted, dtype=grad.dtype, device=grad.device) / sqrt(rank)
        r = grad @ state["projection"].T if right else state["projection"] @ grad
        if step == 0:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(r), torch.zeros_like(r)
        state["step"] = step = step + 1
        m, v = state["exp_avg"].lerp_(r, 0.1), state["exp_avg_sq"].lerp_(r.square(), 0.001)
        normalized = m / (v.sqrt() + 1e-6)
        dims = (0, 1) if group["scale_type"] == "tensor" else (1 if right else 0)
        x = grad * (normalized.norm(dim=dims, keepdim=True) / (r.norm(dim=dims, keepdim=True) + SMALLEST))
        norm = x.norm()
        if "norm" in state:
            limiter = (norm / (state["norm"] + SMALLEST)).clamp(min=1.01) / 1.01
            x, norm = x / limiter, norm / limiter
        state["norm"] = norm
        rate = group["lr"] * sqrt(group["scale"]) * sqrt(1 - 0.999**step) / (1 - 0.9**step)
        param.sub_(x, alpha=rate)
