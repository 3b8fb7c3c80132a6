"""Recurrences over packed rows, with derivatives by hand: autograd's, through a loop over steps, take twice as long.

The last two dimensions are positions and features. Each dimension before them is a batch, also in the weights.
`GRUScan` has second derivatives because its first derivative is made of `Solve` and of differentiable operations.
"""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def project(x, weight):
    """x (..., R, S, I) times weight (..., I, O), one product for each leading dimension."""
    return (x.flatten(-3, -2) @ weight).unflatten(-2, x.shape[-3:-1])


def outer(left, right):
    """Sum over rows and steps of the outer products of left (..., R, S, O) and right (..., R, S, I): (..., O, I)."""
    return left.flatten(-3, -2).mT @ right.flatten(-3, -2)


def add_product(out, left, right):
    """Add left (..., R, I) times right (..., I, O) to out (..., R, O), in one operation."""
    out.flatten(0, -3).baddbmm_(left.flatten(0, -3), right.flatten(0, -3)) if out.dim() > 2 else out.addmm_(left, right)


def shift(states, goes_on):
    """The states (..., S, D) before each step: those of the step before, or 0 where a window starts."""
    return F.pad(states[..., :-1, :], (0, 0, 1, 0)) * goes_on[..., None]


class GRUScan(Function):
    """States (..., R, S, D) of a GRU from projected inputs (..., R, S, 3 D), from 0 where goes_on (..., R, S) is 0.

    h_t = n_t + z_t (p_t - n_t) with p_t = goes_on_t h_(t-1) and torch's gates r, z, n. For the derivative a linear
    recurrence is solved (see `Solve`); all else is done for all steps at once.
    """

    @staticmethod
    def forward(ctx, inputs, goes_on, weight, bias):
        size, weights = weight.shape[-1], weight.mT
        first, last = inputs.split([2 * size, size], -1)
        reset_update, new = bias[..., None, None, :].split([2 * size, size], -1)
        gates = torch.cat([first + reset_update, new.expand_as(last)], -1).movedim(-2, 0).contiguous()
        # Views of all steps are made once, because calling operations is what costs here.
        both, state_n = (part.unbind() for part in gates.split([2 * size, size], -1))
        reset, update = (part.unbind() for part in gates[..., : 2 * size].chunk(2, -1))
        states = gates.new_empty(*gates.shape[:-1], size)
        state = gates.new_zeros(states.shape[1:])
        steps = zip(
            gates, both, state_n, reset, update, last.unbind(-2), goes_on[..., None].unbind(-2), states, strict=True
        )
        for all_gates, r_z, s_n, r, z, x_n, on, out in steps:
            before = state * on
            add_product(all_gates, before, weights)
            r_z.sigmoid_()
            state = torch.lerp(torch.addcmul(x_n, r, s_n).tanh_(), before, z, out=out)
        states = states.movedim(0, -2).contiguous()
        ctx.save_for_backward(inputs, goes_on, weight, bias, states)
        return states

    @staticmethod
    def backward(ctx, gradient):
        inputs, goes_on, weight, bias, states = ctx.saved_tensors
        before = shift(states, goes_on)
        state = project(before, weight.mT) + bias[..., None, None, :]
        (x_r, x_z, x_n), (s_r, s_z, s_n) = inputs.chunk(3, -1), state.chunk(3, -1)
        r, z = torch.sigmoid(x_r + s_r), torch.sigmoid(x_z + s_z)
        n = torch.tanh(x_n + r * s_n)
        by_n = (1 - z) * (1 - n * n)
        jacobian = torch.cat([by_n * s_n * r * (1 - r), (before - n) * z * (1 - z), by_n * r], -1)
        gradient = Solve.apply(gradient, jacobian, z, goes_on, weight, True)
        to_state = by_gate(jacobian, gradient)
        to_inputs = torch.cat([to_state[..., : -n.shape[-1]], by_n * gradient], -1)
        return to_inputs, None, outer(to_state, before), to_state.sum((-2, -3))


def by_gate(jacobian, state):
    """Each gate's part of the jacobian (..., K D) times the state (..., D): (..., K D)."""
    return (jacobian.unflatten(-1, (-1, state.shape[-1])) * state[..., None, :]).flatten(-2)


class Solve(Function):
    """The linear recurrence v_t = u_t + J_t v_(t-1) or, transposed, v_t = u_t + J_(t+1)' v_(t+1).

    J_t = goes_on_t (diag(z_t) + sum_k diag(c_tk) W_k) is the Jacobian of a step in the state before it; u and z are
    (..., R, S, D), c is (..., R, S, K D), W (..., K D, D). The derivative is the same recurrence the other way round.
    """

    @staticmethod
    def forward(ctx, u, c, z, goes_on, weight, transposed):
        size, on, weights = u.shape[-1], goes_on[..., None], weight.mT
        parts, direct = ((value * on).movedim(-2, 0).contiguous() for value in (c, z))
        out = u.movedim(-2, 0).clone(memory_format=torch.contiguous_format)
        parts, direct, states = parts.unflatten(-1, (-1, size)).unbind(), direct.unbind(), out.unbind()
        if transposed:
            for v, following, part, z_t in reversed(list(zip(states, states[1:], parts[1:], direct[1:], strict=False))):
                gates = (part * following[..., None, :]).flatten(-2)
                add_product(v.addcmul_(z_t, following), gates, weight)
        else:
            for v, previous, part, z_t in zip(states[1:], states, parts[1:], direct[1:], strict=False):
                gates = (previous @ weights).unflatten(-1, (-1, size))
                v.addcmul_(z_t, previous).add_(gates.mul_(part).sum(-2))
        out = out.movedim(0, -2).contiguous()
        ctx.transposed = transposed
        ctx.save_for_backward(c, z, goes_on, weight, out)
        return out

    @staticmethod
    def backward(ctx, gradient):
        c, z, goes_on, weight, out = ctx.saved_tensors
        other = Solve.apply(gradient, c, z, goes_on, weight, not ctx.transposed)
        forward, back = (other, out) if ctx.transposed else (out, other)
        before = shift(forward, goes_on)
        to_c = by_gate(project(before, weight.mT), back)
        return other, to_c, before * back, None, outer(by_gate(c, back), before), None


class LSTMScan(Function):
    """States (..., R, S, H) of an LSTM from inputs (..., R, S, I), weight (4 H, I + H) and bias (4 H,).

    State and memory before each window, where goes_on (..., R, S) is 0, are those of `start` (2, H). The gates are
    enter, forget, new and leave. It has first derivatives alone.
    """

    @staticmethod
    def forward(ctx, inputs, goes_on, weight, bias, start):
        size = start.shape[-1]
        to_input, to_state = weight.split([weight.shape[-1] - size, size], -1)
        x, on = (value.flatten(0, -3).movedim(-2, 0) for value in (inputs, goes_on[..., None]))  # (S, N, ...)
        gates = F.linear(x, to_input, bias)
        before, after = (gates.new_empty(2, *gates.shape[:-1], size) for _ in range(2))  # states and memories
        parts = gates[..., : 2 * size], gates[..., 2 * size : 3 * size], gates[..., 3 * size :], *gates.chunk(4, -1)[:2]
        state, memory = (row.expand(gates.shape[1], -1) for row in start)
        for all_gates, goes, b_state, b_memory, a_state, a_memory, both, new, leave, enter, forget in zip(
            *(value.unbind() for value in (gates, on, *before, *after, *parts)), strict=True
        ):
            torch.lerp(start[0], state, goes, out=b_state)
            torch.lerp(start[1], memory, goes, out=b_memory)
            all_gates.addmm_(b_state, to_state.T)
            both.sigmoid_(), new.tanh_(), leave.sigmoid_()
            memory = torch.mul(forget, b_memory, out=a_memory).addcmul_(enter, new)
            state = torch.tanh(memory, out=a_state).mul_(leave)
        ctx.save_for_backward(x, on, weight, gates, before, after[1])
        return after[0].movedim(0, -2).reshape(*inputs.shape[:-1], size)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, on, weight, gates, (states, memories), now = ctx.saved_tensors
        size, shape = now.shape[-1], gradient.shape[:-1]
        to_input, to_state = weight.split([weight.shape[-1] - size, size], -1)
        enter, forget, new, leave = gates.chunk(4, -1)
        inside, gradient = now.tanh(), gradient.flatten(0, -3).movedim(-2, 0)
        by_memory = [new * enter * (1 - enter), memories * forget * (1 - forget), enter * (1 - new * new)]
        factors = torch.stack(by_memory, -2), inside * leave * (1 - leave), leave * (1 - inside * inside), forget
        to_gates, to_before = torch.empty_like(gates), torch.empty_like(torch.stack([states, memories]))
        outs = to_gates, to_gates.unflatten(-1, (4, size))[..., :3, :], to_gates[..., 3 * size :], *to_before
        to_state_now = to_memory = torch.zeros_like(now[0])
        steps = zip(*(value.unbind() for value in (gradient, on, *factors, *outs)), strict=True)
        for its, goes, in_memory, in_leave, in_inside, keep, all_gates, three, last, b_state, b_memory in reversed(
            list(steps)
        ):
            to_state_now = its + to_state_now
            to_memory = torch.addcmul(to_memory, to_state_now, in_inside)
            torch.mul(in_memory, to_memory[:, None], out=three)
            torch.mul(in_leave, to_state_now, out=last)
            to_state_now = torch.mm(all_gates, to_state, out=b_state) * goes
            to_memory = torch.mul(to_memory, keep, out=b_memory) * goes
        flat = to_gates.flatten(0, 1)
        to_weight = flat.T @ torch.cat([x, states], -1).flatten(0, 1)
        to_inputs = (to_gates @ to_input).movedim(0, -2).reshape(*shape, -1)
        return to_inputs, None, to_weight, flat.sum(0), ((1 - on) * to_before).sum((1, 2))
