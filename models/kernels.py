"""Pieces of the learners whose derivatives are written by hand, because autograd's second derivatives of them are slow.

Every leading dimension is a batch, also in the weights. First derivatives are made of such pieces and of
differentiable operations, so that second derivatives exist; the second derivatives of some are the end.
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

aten = torch.ops.aten


# -----------------------------------------------------------------------------
# pointwise


class Standardise(Function):
    """x (..., D) with mean 0 and mean square 1 over the last dimension: layer norm without weights."""

    @staticmethod
    def forward(ctx, x, eps):
        out, mean, scale = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        ctx.save_for_backward(x, mean, scale)
        return out

    @staticmethod
    def backward(ctx, slope):
        return StandardiseSlope.apply(slope, *ctx.saved_tensors), None


class StandardiseSlope(Function):
    """Derivative of `Standardise`, P(g) = r (g - mean(g) - y mean(g y)) for y = r (x - mean(x))."""

    @staticmethod
    def forward(ctx, slope, x, mean, scale):
        out = standardise_slope(slope, x, mean, scale)
        ctx.save_for_backward(slope, x, mean, scale, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, c):
        """In g, P(c); in x, -r y mean(c P(g)) - r P(mean(g y) c + mean(c y) g)."""
        slope, x, mean, scale, out = ctx.saved_tensors
        y = (x - mean).mul_(scale)
        mixed = (slope * y).mean(-1, keepdim=True) * c + (c * y).mean(-1, keepdim=True) * slope
        to_x = standardise_slope(mixed, x, mean, scale).addcmul_(y, (c * out).mean(-1, keepdim=True))
        return standardise_slope(c, x, mean, scale), to_x.mul_(-scale), None, None


def standardise_slope(slope, x, mean, scale):
    return aten.native_layer_norm_backward(slope, x, x.shape[-1:], mean, scale, None, None, [True, False, False])[0]


class Gelu(Function):
    """x Phi(x) with the normal distribution's Phi."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    def backward(ctx, slope):
        return GeluSlope.apply(slope, *ctx.saved_tensors)


class GeluSlope(Function):
    """g (Phi(x) + x phi(x)), whose derivative in x is g phi(x) (2 - x^2)."""

    @staticmethod
    def forward(ctx, slope, x):
        ctx.save_for_backward(slope, x)
        return aten.gelu_backward(slope, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, c):
        slope, x = ctx.saved_tensors
        square = x * x
        density = torch.exp(-0.5 * square).mul_((2 * math.pi) ** -0.5)
        return aten.gelu_backward(c, x), square.neg_().add_(2).mul_(density).mul_(slope).mul_(c)


# -----------------------------------------------------------------------------
# recurrence


def project(x, weight):
    """x (..., R, S, I) times weight (..., I, O), one product for each leading dimension."""
    return (x.flatten(-3, -2) @ weight).unflatten(-2, x.shape[-3:-1])


def outer(left, right):
    """Sum over rows and steps of the outer products of left (..., R, S, O) and right (..., R, S, I): (..., O, I)."""
    return left.flatten(-3, -2).transpose(-1, -2) @ right.flatten(-3, -2)


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
        size, across = weight.shape[-1], weight.transpose(-1, -2)
        steps = inputs.movedim(-2, 0).contiguous()
        states = steps.new_zeros(len(steps), *steps.shape[1:-1], size)
        state = states[0]
        for x, on, out in zip(steps, goes_on[..., None].movedim(-2, 0), states, strict=True):
            before = state * on
            both, new = (before @ across + bias[..., None, :]).split([2 * size, size], -1)
            r, z = both.add_(x[..., : 2 * size]).sigmoid_().chunk(2, -1)
            new = torch.addcmul(x[..., 2 * size :], r, new).tanh_()
            state = torch.lerp(new, before, z, out=out)
        states = states.movedim(0, -2).contiguous()
        ctx.save_for_backward(inputs, goes_on, weight, bias, states)
        return states

    @staticmethod
    def backward(ctx, slope):
        inputs, goes_on, weight, bias, states = ctx.saved_tensors
        before = shift(states, goes_on)
        state = project(before, weight.transpose(-1, -2)) + bias[..., None, None, :]
        (x_r, x_z, x_n), (s_r, s_z, s_n) = inputs.chunk(3, -1), state.chunk(3, -1)
        r, z = torch.sigmoid(x_r + s_r), torch.sigmoid(x_z + s_z)
        n = torch.tanh(x_n + r * s_n)
        by_n = (1 - z) * (1 - n * n)
        jacobian = torch.cat([by_n * s_n * r * (1 - r), (before - n) * z * (1 - z), by_n * r], -1)
        slope = Solve.apply(slope, jacobian, z, goes_on, weight, True)
        to_state = by_gate(jacobian, slope)
        to_inputs = torch.cat([to_state[..., : -n.shape[-1]], by_n * slope], -1)
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
        steps, size = range(u.shape[-2]), u.shape[-1]
        on = goes_on[..., None]
        inputs, parts, direct = (value.movedim(-2, 0).contiguous() for value in (u, c * on, z * on))
        out = torch.empty_like(inputs)
        if transposed:
            v = out[-1].copy_(inputs[-1])
            for t in steps[:0:-1]:
                v = torch.addcmul(inputs[t - 1], direct[t], v, out=out[t - 1]).add_(by_gate(parts[t], v) @ weight)
        else:
            across = weight.transpose(-1, -2)
            v = out[0].copy_(inputs[0])
            for t in steps[1:]:
                gates = (v @ across).mul_(parts[t]).unflatten(-1, (-1, size))
                v = torch.addcmul(inputs[t], direct[t], v, out=out[t]).add_(gates.sum(-2))
        out = out.movedim(0, -2).contiguous()
        ctx.transposed = transposed
        ctx.save_for_backward(c, z, goes_on, weight, out)
        return out

    @staticmethod
    def backward(ctx, slope):
        c, z, goes_on, weight, out = ctx.saved_tensors
        other = Solve.apply(slope, c, z, goes_on, weight, not ctx.transposed)
        forward, back = (other, out) if ctx.transposed else (out, other)
        before = shift(forward, goes_on)
        to_c = by_gate(project(before, weight.transpose(-1, -2)), back)
        return other, to_c, before * back, None, outer(by_gate(c, back), before), None
