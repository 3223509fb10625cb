"""An Adam of a few lines, and the same with one thing wrong each: what `lowmem doctor` has to notice."""

import itertools

import torch
from torch.optim import Optimizer

COUNTER = itertools.count(1)


class TinyAdam(Optimizer):
    """AdamW in its simplest form; what is broken overrides a method."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.one(p, p.grad, self.state[p], group)

    def one(self, p, g, state, group):
        old = p.clone()
        p.sub_(group["lr"] * self.direction(p, self.gradient(p, g, group), state, group))
        self.decay(p, old, group)

    def gradient(self, p, g, group):
        return g

    def direction(self, p, g, state, group):
        if not state:
            state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
        beta1, beta2 = group["betas"]
        state["step"] += 1
        state["m"] = beta1 * state["m"] + (1 - beta1) * g
        state["v"] = beta2 * state["v"] + (1 - beta2) * g * g
        m, v = state["m"] / (1 - beta1 ** state["step"]), state["v"] / (1 - beta2 ** state["step"])
        return m / self.root(v, group["eps"])

    def root(self, v, eps):
        return v.sqrt() + eps

    def decay(self, p, old, group):
        p.sub_(group["lr"] * group["weight_decay"] * old)


class HiddenBetas(TinyAdam):
    """Its group does not show its betas."""

    def __init__(self, params, lr=1e-3, betas=(0.5, 0.9), eps=1e-8, weight_decay=0.0):
        super().__init__(params, lr, betas, eps, weight_decay)
        for group in self.param_groups:
            self.betas = group.pop("betas")

    def direction(self, p, g, state, group):
        return super().direction(p, g, state, {**group, "betas": self.betas})


class FirstStepLooks(TinyAdam):
    """Nothing moves in the first step."""

    def one(self, p, g, state, group):
        if state:
            super().one(p, g, state, group)
        else:
            self.direction(p, g, state, group)


class CoupledDecay(TinyAdam):
    def gradient(self, p, g, group):
        return g + group["weight_decay"] * p

    def decay(self, p, old, group):
        pass


class DecayWithoutLr(TinyAdam):
    def decay(self, p, old, group):
        p.sub_(group["weight_decay"] * old)


class DecayAfter(TinyAdam):
    def decay(self, p, old, group):
        p.mul_(1 - group["lr"] * group["weight_decay"])


class DecayForgotten(TinyAdam):
    def decay(self, p, old, group):
        pass


class MaskedDecay(TinyAdam):
    """Only of what is positive."""

    def decay(self, p, old, group):
        p.sub_(group["lr"] * group["weight_decay"] * old.clamp(min=0))


class RateOfStep(TinyAdam):
    """Halved from step to step."""

    def decay(self, p, old, group):
        p.sub_(group["lr"] * group["weight_decay"] * old / 2 ** self.state[p]["step"])


class CoupledMomentum(TinyAdam):
    """Linear in the gradient, so that one step does not tell coupled decay from decoupled."""

    def direction(self, p, g, state, group):
        state["m"] = 0.9 * state.get("m", torch.zeros_like(p)) + g + group["weight_decay"] * p
        return state["m"]

    def decay(self, p, old, group):
        pass


class EpsInside(TinyAdam):
    def root(self, v, eps):
        return (v + eps).sqrt()


class EpsTwice(TinyAdam):
    def root(self, v, eps):
        return (v + eps).sqrt() + eps


class LowRank(TinyAdam):
    """Its update is the gradient's best approximation of rank 2."""

    def direction(self, p, g, state, group):
        if g.ndim != 2:
            return g
        u, s, v = torch.linalg.svd(g.float(), full_matrices=False)
        return (u[:, :2] * s[:2]) @ v[:2]


class RankOfGroup(TinyAdam):
    """Of the rank that its group has, which its constructor does not know."""

    def direction(self, p, g, state, group):
        if "rank" not in group or g.ndim != 2:
            return g
        u, s, v = torch.linalg.svd(g.float(), full_matrices=False)
        return (u[:, : group["rank"]] * s[: group["rank"]]) @ v[: group["rank"]]


class Nondeterministic(TinyAdam):
    def direction(self, p, g, state, group):
        return super().direction(p, g, state, group) * (1 + 1e-3 * next(COUNTER))


class GlobalNoise(TinyAdam):
    def direction(self, p, g, state, group):
        return super().direction(p, g, state, group) + 1e-3 * torch.randn_like(p)


class StateLost(TinyAdam):
    def state_dict(self):
        return {**super().state_dict(), "state": {}}


class NotWeightsOnly(TinyAdam):
    def direction(self, p, g, state, group):
        direction = super().direction(p, g, state, group)
        state["counter"] = COUNTER
        return direction


class ChangesGradients(TinyAdam):
    def gradient(self, p, g, group):
        return g.mul_(0.5)


class FreesGradients(TinyAdam):
    def one(self, p, g, state, group):
        super().one(p, g, state, group)
        p.grad = None


class MovesWithoutGradient(TinyAdam):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p) if p.grad is None else p.grad
        super().step()


class ContiguousOnly(TinyAdam):
    """It takes memory for values, as fused kernels on a CPU once did."""

    def one(self, p, g, state, group):
        flat = p.as_strided((p.numel(),), (1,))
        flat.sub_(group["lr"] * self.direction(p, g, state, group).flatten())


class MatricesOnly(TinyAdam):
    def one(self, p, g, state, group):
        if p.ndim > 2:
            raise NotImplementedError("matrices only")
        super().one(p, g, state, group)


class SkipsNan(TinyAdam):
    """A step with a NaN moves nothing."""

    @torch.no_grad()
    def step(self, closure=None):
        if all(p.grad is None or p.grad.isfinite().all() for group in self.param_groups for p in group["params"]):
            super().step()


class HidesNan(TinyAdam):
    """The parameter is spared, and the state is not: it never moves again."""

    def one(self, p, g, state, group):
        p.sub_((group["lr"] * self.direction(p, g, state, group)).nan_to_num(nan=0.0))
        self.decay(p, p.clone(), group)


class Raises(TinyAdam):
    def one(self, p, g, state, group):
        raise RuntimeError("no")
