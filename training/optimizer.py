"""The outer optimizer: AdamW and the running mean of what it moves.

With sparse gradients neither costs anything for rows that an iteration does not use.
"""

import torch
from torch import nn

AT_ONCE = 65_536  # rows of a table whose means are made together


class RowAdamW(torch.optim.AdamW):
    """AdamW that moves only the rows which a sparse gradient has; others stay, and so do their moments.

    Dense gradients, weight decay (of dense ones alone) and the state are torch's. `means`, tensors like the parameters,
    become their running means: the first step makes them equal, each further one moves them by 1 - `keep` of the way.
    In groups marked `by_rows`, whose gradients are sparse, rows that steps did not use wait for one that does or for
    `catch_up`; the steps that a row's mean has met are in the state, as is the mean as it waits.
    """

    def __init__(self, groups, means=(), keep=0.0, **given):
        super().__init__(groups, fused=True, **given)  # one operation for all parameters
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.means, self.keep = dict(zip(parameters, means, strict=True)) if means else {}, keep

    @torch.no_grad()
    def step(self):
        pairs = [(group, p) for group in self.param_groups for p in group["params"]]
        sparse = [(group, p, p.grad) for group, p in pairs if p.grad is not None and p.grad.is_sparse]
        for _, p, _ in sparse:
            p.grad = None
        shares = {p: 1 - self.keep if self.state.get(p) else 1.0 for p in self.means if p.grad is not None}
        super().step()
        for p, share in shares.items():
            self.means[p].lerp_(p, share)
        for group, p, gradient in sparse:
            p.grad = gradient
            self.step_rows(group, p, gradient.coalesce())

    def step_rows(self, group, p, gradient):
        """Adam on the rows of `p` that the coalesced sparse gradient has."""
        if not self.state[p]:
            self.begin(group, p)
        state, (first, second) = self.state[p], group["betas"]
        rows, values, steps = gradient.indices()[0], gradient.values(), float(state["step"])
        if "met" in state:
            self.means[p].index_copy_(0, rows, self.mean_of_rows(p, rows))
            state["met"].index_fill_(0, rows, steps)
        state["step"] += 1
        steps += 1
        mean = state["exp_avg"].index_select(0, rows).lerp_(values, 1 - first)
        square = state["exp_avg_sq"].index_select(0, rows).lerp_(values.square(), 1 - second)
        state["exp_avg"].index_copy_(0, rows, mean)
        state["exp_avg_sq"].index_copy_(0, rows, square)
        scale = (square / (1 - second**steps)).sqrt_() + group["eps"]
        p.index_add_(0, rows, mean / scale, alpha=-group["lr"] / (1 - first**steps))

    def begin(self, group, p):
        """Give a parameter of a group the state that it has before its first step."""
        state = self.state[p]
        state["step"] = torch.zeros((), device=p.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        if p in self.means and group["by_rows"]:
            state["met"], state["mean"] = p.new_zeros(len(p)), self.means[p].detach()

    def mean_of_rows(self, p, rows):
        """The mean of rows of a table after all steps so far; they have not moved since their mean met the last one."""
        step, met = self.state[p]["step"], self.state[p]["met"].index_select(0, rows)
        left = torch.where((met == 0) & (step > 0), 0.0, self.keep ** (step - met))
        return torch.lerp(p.index_select(0, rows), self.means[p].index_select(0, rows), left[:, None])

    @torch.no_grad()
    def mean_of(self, p):
        """The mean of a parameter after all steps so far."""
        if "met" not in self.state.get(p, ()):
            return self.means[p].detach()
        return torch.cat([self.mean_of_rows(p, rows) for rows in torch.arange(len(p), device=p.device).split(AT_ONCE)])

    @torch.no_grad()
    def catch_up(self):
        """Let all means meet all steps so far."""
        for p, mean in self.means.items():
            if "met" in self.state.get(p, ()):
                mean.copy_(self.mean_of(p))
                self.state[p]["met"].fill_(self.state[p]["step"])

    @torch.no_grad()
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for p, mean in self.means.items():
            if "mean" in self.state.get(p, ()):
                mean.copy_(self.state[p]["mean"])
                self.state[p]["mean"] = mean.detach()


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
