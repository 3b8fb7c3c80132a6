"""The outer optimizer: AdamW, which with sparse gradients costs nothing for rows that an iteration does not use."""

import torch
from torch import nn


class RowAdamW(torch.optim.AdamW):
    """AdamW that moves only the rows which a sparse gradient has; others stay, and so do their moments.

    Dense gradients, weight decay (of dense ones alone) and the state are torch's.
    """

    def __init__(self, groups, **given):
        super().__init__(groups, fused=True, **given)  # one operation for all parameters

    @torch.no_grad()
    def step(self):
        pairs = [(group, p) for group in self.param_groups for p in group["params"]]
        sparse = [(group, p, p.grad) for group, p in pairs if p.grad is not None and p.grad.is_sparse]
        for _, p, _ in sparse:
            p.grad = None
        super().step()
        for group, p, gradient in sparse:
            p.grad = gradient
            self.step_rows(group, p, gradient.coalesce())

    def step_rows(self, group, p, gradient):
        """Adam on the rows of `p` that the coalesced sparse gradient has."""
        state, (first, second) = self.state[p], group["betas"]
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        rows, values = gradient.indices()[0], gradient.values()
        mean = state["exp_avg"].index_select(0, rows).lerp_(values, 1 - first)
        square = state["exp_avg_sq"].index_select(0, rows).lerp_(values.square(), 1 - second)
        state["exp_avg"].index_copy_(0, rows, mean)
        state["exp_avg_sq"].index_copy_(0, rows, square)
        steps = float(state["step"])
        scale = (square / (1 - second**steps)).sqrt_() + group["eps"]
        p.index_add_(0, rows, mean / scale, alpha=-group["lr"] / (1 - first**steps))


def lay_end_to_end(parameters):
    """One parameter (n,) with the values and gradients of the given ones, which become views of it.

    What is done with all of them is then one operation. Their gradients are to be zeroed, see `clear`, never replaced.
    """
    whole = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    whole.grad = torch.zeros_like(whole)
    sizes = [p.numel() for p in parameters]
    for p, values, gradient in zip(parameters, whole.data.split(sizes), whole.grad.split(sizes), strict=True):
        p.data, p.grad = values.view_as(p), gradient.view_as(p)
    return whole


def clear(parameters):
    """Zero the gradients of parameters, in place where they are dense."""
    for p in parameters:
        p.grad = None if p.grad is None or p.grad.is_sparse else p.grad.zero_()


@torch.no_grad()
def clip(parameters, limit):
    """Scale gradients, dense or sparse, to a joint norm of at most `limit`; the norm before, as a tensor."""
    gradients = []
    for p in parameters:
        if p.grad is not None:
            p.grad = p.grad.coalesce() if p.grad.is_sparse else p.grad
            gradients.append(p.grad.values() if p.grad.is_sparse else p.grad)
    norm = torch.nn.utils.get_total_norm(gradients)
    factor = (limit / (norm + 1e-6)).clamp_max(1)
    for gradient in gradients:
        gradient.mul_(factor)
    return norm
