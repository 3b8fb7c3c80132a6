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


class Norm(Function):
    """Layer norm of x (T, ..., D): y w + b with y of mean 0 and mean square 1, w and b (T, D) each task's own."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        mean = x.mean(-1, keepdim=True)
        y = x - mean
        scale = y.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # half the time of torch's layer norm
        ctx.save_for_backward(x, weight, mean, scale, y.mul_(scale))
        return torch.addcmul(of_each(bias, x), y, of_each(weight, x))

    @staticmethod
    def backward(ctx, slope):
        return *NormSlope.apply(slope, *ctx.saved_tensors), None


class NormSlope(Function):
    """Derivatives of `Norm` for slope g: in x, P(g w) with P(h) = r (h - mean(h) - y mean(h y)), y = r (x - mean(x));
    in w and b the sums of g y and of g over positions."""

    @staticmethod
    def forward(ctx, slope, x, weight, mean, scale, y):
        inside = slope * of_each(weight, x)
        out, positions = standardise_slope(inside, x, mean, scale), tuple(range(1, x.dim() - 1))
        ctx.save_for_backward(slope, x, weight, mean, scale, y, inside, out)
        return out, (slope * y).sum(positions), slope.sum(positions)

    @staticmethod
    @once_differentiable
    def backward(ctx, c, to_weight, to_bias):
        """In h = g w, P(c); in x, -r y mean(c P(h)) + P(g c_w - r (mean(h y) c + mean(c y) h)), c_w the slope in w."""
        slope, x, weight, mean, scale, y, inside, out = ctx.saved_tensors
        mixed = (inside * y).mean(-1, keepdim=True) * c + (c * y).mean(-1, keepdim=True) * inside
        to_weight = of_each(to_weight, x)
        to_x = standardise_slope(mixed.mul_(-scale).addcmul_(slope, to_weight), x, mean, scale)
        to_x.addcmul_(y, (c * out).mean(-1, keepdim=True).mul_(-scale))
        pulled, positions = standardise_slope(c, x, mean, scale), tuple(range(1, x.dim() - 1))
        to_slope = torch.addcmul(of_each(to_bias, x), y, to_weight).addcmul_(pulled, of_each(weight, x))
        return to_slope, to_x, pulled.mul_(slope).sum(positions), None, None, None


def of_each(parameter, x):
    """A parameter (D,), or each task's (T, D), so that it broadcasts against x (..., D)."""
    return parameter.view(*parameter.shape[:-1], *(1,) * (x.dim() - parameter.dim()), parameter.shape[-1])


def standardise_slope(slope, x, mean, scale):
    return aten.native_layer_norm_backward(slope, x, x.shape[-1:], mean, scale, None, None, [True, False, False])[0]


class Gelu(Function):
    """x Phi(x) with the normal distribution's Phi."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.slope = None
        return F.gelu(x)

    @staticmethod
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        if ctx.slope is None and not torch.is_grad_enabled():  # nobody will ask for the second derivative
            return aten.gelu_backward(slope, x)
        if ctx.slope is None:  # computed by the inner gradient, used again by the meta-gradient
            ctx.slope = aten.gelu_backward(torch.ones_like(x), x.detach())
        return GeluSlope.apply(slope, x, ctx.slope)


class GeluSlope(Function):
    """g (Phi(x) + x phi(x)), whose derivative in x is g phi(x) (2 - x^2); `own`, the factor of g, is handed on."""

    @staticmethod
    def forward(ctx, slope, x, own):
        ctx.save_for_backward(slope, x, own)
        return slope * own

    @staticmethod
    @once_differentiable
    def backward(ctx, c):
        slope, x, own = ctx.saved_tensors
        square = x * x
        density = (-0.5 * square).exp_().mul_((2 * math.pi) ** -0.5)
        return c * own, square.neg_().add_(2).mul_(density).mul_(slope).mul_(c), None


# -----------------------------------------------------------------------------
# a linear layer of each task's own


class Affine(Function):
    """x W' + b, or across, W x', for x (T, ..., I), W (T, O, I) and b (T, O) or None: (T, ..., O) or (T, O, N).

    Autograd's derivatives of a batch of matrix products come out transposed, which all that follows pays for.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, across_):
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.across, flat = bias is not None, across_, x.flatten(1, -2)
        if across_:
            return torch.bmm(weight, across(flat))
        return affine(flat, weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, slope):
        return *AffineSlope.apply(slope, *ctx.saved_tensors, ctx.has_bias, ctx.across), None


class AffineSlope(Function):
    """Derivatives of `Affine` in x, W and b (None where there is none) for slope G: G W, G' x and the sum of G."""

    @staticmethod
    def forward(ctx, slope, x, weight, has_bias, across_):
        ctx.across, ctx.shape, x = across_, x.shape, x.flatten(1, -2)
        slope = across(slope) if across_ else slope.flatten(1, -2)
        ctx.save_for_backward(slope, x, weight)
        to_bias = slope.sum(1) if has_bias else None
        return torch.bmm(slope, weight).view(ctx.shape), torch.bmm(across(slope), x), to_bias

    @staticmethod
    @once_differentiable
    def backward(ctx, to_x, to_weight, to_bias):
        slope, x, weight = ctx.saved_tensors
        to_x = to_x.flatten(1, -2)
        if ctx.across:
            to_slope = torch.bmm(weight, across(to_x)).baddbmm_(to_weight, across(x))
        else:
            to_slope = affine(to_x, weight, to_bias).baddbmm_(x, across(to_weight)).view(*ctx.shape[:-1], -1)
        return to_slope, torch.bmm(slope, to_weight).view(ctx.shape), torch.bmm(across(slope), to_x), None, None


def affine(x, weight, bias):
    """x W' + b for x (T, N, I), W (T, O, I) and b (T, O) or None: (T, N, O)"""
    return torch.bmm(x, across(weight)) if bias is None else torch.baddbmm(bias[:, None], x, across(weight))


class Dot(Function):
    """The inner products (T, ...) of x (T, ..., D) with w (T, D)."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.bmm(weight[:, None], across(x.flatten(1, -2))).view(x.shape[:-1])  # rows are faster than columns

    @staticmethod
    def backward(ctx, slope):
        x, weight = ctx.saved_tensors
        to_weight = torch.bmm(slope.flatten(1)[:, None], x.flatten(1, -2))[:, 0]
        return slope[..., None] * of_each(weight, x), to_weight


# -----------------------------------------------------------------------------
# attention


class Attend(Function):
    """V A' with A = softmax(Q' K / sqrt(d) + hide), for queries, keys and values (N, d, S) of heads and `hide`
    (..., S, S) of rows, whose heads follow each other.

    Positions come last: matrix products of many small matrices are twice as fast with a wide result.
    """

    @staticmethod
    def forward(ctx, q, k, v, hide):
        scores, hide = product(across(q), k, q.shape[1] ** -0.5), hide.flatten(0, -3)[:, None]
        weights = softmax(scores.view(len(hide), -1, *scores.shape[1:]).add_(hide)).view_as(scores)
        ctx.save_for_backward(q, k, v, weights)
        return torch.bmm(v, across(weights))

    @staticmethod
    def backward(ctx, slope):
        return *AttendSlope.apply(slope, *ctx.saved_tensors), None


class AttendSlope(Function):
    """Derivatives of `Attend` in Q, K and V for slope G: K P', Q P and G A with P = softmax'(G' V) / sqrt(d)."""

    @staticmethod
    def forward(ctx, slope, q, k, v, weights):
        slope, scale = slope.contiguous(), q.shape[1] ** -0.5  # else each product below copies it
        by_weight = torch.bmm(across(slope), v)
        by_score = softmax_slope(by_weight, weights)  # but for the scale, which costs nothing in a product
        ctx.save_for_backward(slope, q, k, v, weights, by_weight, by_score)
        return product(k, across(by_score), scale), product(q, by_score, scale), torch.bmm(slope, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, to_q, to_k, to_v):
        slope, q, k, v, weights, by_weight, by_score = ctx.saved_tensors
        scale = q.shape[1] ** -0.5
        mixed = product(across(to_q), k, scale).baddbmm_(across(q), to_k, alpha=scale)
        pulled = softmax_slope(mixed, weights)
        mean_slope, mean_mixed = ((weights * x).sum(-1, keepdim=True) for x in (by_weight, mixed))
        in_weight = torch.bmm(across(slope), to_v).addcmul_(mixed, by_weight - mean_slope)
        in_weight.addcmul_(mean_mixed, by_weight, value=-1)
        in_score = softmax_slope(in_weight, weights)
        return (
            torch.bmm(v, across(pulled)).baddbmm_(to_v, across(weights)),
            product(k, across(in_score), scale).baddbmm_(to_k, across(by_score), alpha=scale),
            product(q, in_score, scale).baddbmm_(to_q, by_score, alpha=scale),
            torch.bmm(slope, pulled),
            None,
        )


class SplitHeads(Function):
    """Projections x (..., R, 3 H d, S) plus b (3 H d,), or each task's (T, 3 H d), as queries, keys and values
    (N, d, S) with N = ... R H. They are copied once, and so are their slopes; the copy adds b, which across a product
    is dear.
    """

    @staticmethod
    def forward(ctx, x, bias, heads):
        ctx.layout, parts = (heads, x.shape, x.stride(), bias.dim()), apart(x, heads)
        out = x.new_empty(parts.shape)
        torch.add(parts, apart(across(of_each(bias, x)), heads), out=out)
        return out.flatten(1, -3).unbind()

    @staticmethod
    def backward(ctx, *slopes):
        return *JoinHeads.apply(*slopes, *ctx.layout), None


class JoinHeads(Function):
    """Derivatives of `SplitHeads` in x, of given shape and strides, and in b, of so many dimensions."""

    @staticmethod
    def forward(ctx, q, k, v, heads, shape, strides, bias_dims):
        ctx.heads = heads
        out = q.new_empty_strided(shape, strides)
        for part, values in zip(apart(out, heads), (q, k, v), strict=True):
            part.copy_(values.view(part.shape))
        return out, out.sum((*range(bias_dims - 1, out.dim() - 2), -1))

    @staticmethod
    def backward(ctx, to_x, to_bias):
        return *SplitHeads.apply(to_x, to_bias, ctx.heads), None, None, None, None


def apart(x, heads):
    """Views (3, ..., H, d, S) of queries, keys and values in x (..., 3 H d, S)."""
    return x.unflatten(-2, (3, heads, -1)).movedim(-4, 0)


class PairScores(Function):
    """Scores v . sigmoid(q_t + k_j) (..., R, S, S) where `mask` holds, else 0; q and k (..., R, S, D), v (..., D).

    Packed windows are short, so few pairs hold: a list of them takes a fraction of all pairs' memory and time.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask):
        pair, at, of = places(mask)
        group = at // (mask[..., 0].numel() // v[..., 0].numel())  # whose v it is
        inside = torch.sigmoid(rows(q, at) + rows(k, of))
        ctx.save_for_backward(inside, q, k, v, pair, at, of, group)
        return of_pairs((inside * rows(v, group)).sum(-1), pair, mask.shape)

    @staticmethod
    def backward(ctx, slope):
        return *PairScoresSlope.apply(slope, *ctx.saved_tensors), None


class PairScoresSlope(Function):
    """Derivatives of `PairScores` in q, k and v: sums over pairs of g v s' for q_t and k_j, and of g s for v.

    `inside`, the sigmoids s, is handed on to save time; the derivative counts it as the function of q and k it is.
    """

    @staticmethod
    def forward(ctx, slope, inside, q, k, v, pair, at, of, group):
        ctx.shape, by_pair = slope.shape, slope.flatten().index_select(0, pair)[:, None]
        moved = inside * (1 - inside) * rows(v, group) * by_pair
        ctx.save_for_backward(by_pair, inside, v, pair, at, of, group)
        return add_rows(moved, at, q), add_rows(moved, of, k), add_rows(by_pair * inside, group, v)

    @staticmethod
    @once_differentiable
    def backward(ctx, to_q, to_k, to_v):
        by_pair, inside, v, pair, at, of, group = ctx.saved_tensors
        own, along, flat = rows(v, group), rows(to_q, at) + rows(to_k, of), inside * (1 - inside)
        to_own = rows(to_v, group)
        to_slope = of_pairs((own * flat * along + to_own * inside).sum(-1), pair, ctx.shape)
        moved = by_pair * flat * (own * along * (1 - 2 * inside) + to_own)
        to_v = add_rows(by_pair * flat * along, group, v)
        return to_slope, None, add_rows(moved, at, to_q), add_rows(moved, of, to_k), to_v, None, None, None, None


def places(mask):
    """Of each pair (t, j) that holds in `mask` (..., S, S), the place among all pairs, and those of t and of j among
    all positions, (P,) each. Here the pairs are counted, for which a GPU is waited for."""
    row, t, j = mask.flatten(0, -3).nonzero().unbind(1)
    at, of = row * mask.shape[-1] + t, row * mask.shape[-1] + j
    return at * mask.shape[-1] + j, at, of


def of_pairs(values, pair, shape):
    """Zeros of a shape but for values (P,) at places `pair` (P,) of its flattened dimensions."""
    return values.new_zeros(shape.numel()).index_copy_(0, pair, values).view(shape)


def rows(x, at):
    """The rows (P, D) of x (..., D) at places `at` (P,) of its flattened dimensions."""
    return F.embedding(at, x.reshape(-1, x.shape[-1]))


def add_rows(values, at, like):
    """The sums of values (P, D) at each place, in the shape of `like`."""
    return values.new_zeros(like[..., 0].numel(), values.shape[-1]).index_add_(0, at, values).view(like.shape)


def across(x):
    return x.transpose(-1, -2)


def product(left, right, scale):
    """The matrix products of left (N, I, J) and right (N, J, K), times a number."""
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=scale)


VECTOR = 16  # torch's softmax takes three times as long for rows that are shorter


def softmax(scores):
    """Softmax over the last dimension."""
    if scores.shape[-1] >= VECTOR:
        return scores.softmax(-1)
    weights = (scores - scores.amax(-1, keepdim=True)).exp_()
    return weights.div_(weights.sum(-1, keepdim=True))


def softmax_slope(slope, weights):
    """Derivative of softmax where it gave `weights`: A (G - sum(A G)) over the last dimension."""
    if weights.shape[-1] < VECTOR:
        product = slope * weights
        return product.addcmul_(weights, product.sum(-1, keepdim=True), value=-1)
    return aten._softmax_backward_data(slope, weights, -1, weights.dtype)


# -----------------------------------------------------------------------------
# recurrence


def project(x, weight):
    """x (..., R, S, I) times weight (..., I, O), one product for each leading dimension."""
    return (x.flatten(-3, -2) @ weight).unflatten(-2, x.shape[-3:-1])


def outer(left, right):
    """Sum over rows and steps of the outer products of left (..., R, S, O) and right (..., R, S, I): (..., O, I)."""
    return across(left.flatten(-3, -2)) @ right.flatten(-3, -2)


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
        size, weights = weight.shape[-1], across(weight)
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
            all_gates.add_(before @ weights)
            r_z.sigmoid_()
            state = torch.lerp(torch.addcmul(x_n, r, s_n).tanh_(), before, z, out=out)
        states = states.movedim(0, -2).contiguous()
        ctx.save_for_backward(inputs, goes_on, weight, bias, states)
        return states

    @staticmethod
    def backward(ctx, slope):
        inputs, goes_on, weight, bias, states = ctx.saved_tensors
        before = shift(states, goes_on)
        state = project(before, across(weight)) + bias[..., None, None, :]
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
        size, on, weights = u.shape[-1], goes_on[..., None], across(weight)
        parts, direct = ((value * on).movedim(-2, 0).contiguous() for value in (c, z))
        out = u.movedim(-2, 0).clone(memory_format=torch.contiguous_format)
        parts, direct, states = parts.unflatten(-1, (-1, size)).unbind(), direct.unbind(), out.unbind()
        if transposed:
            for v, following, part, z_t in reversed(list(zip(states, states[1:], parts[1:], direct[1:], strict=False))):
                spread = (part * following[..., None, :]).flatten(-2)
                v.addcmul_(z_t, following).add_(spread @ weight)
        else:
            for v, previous, part, z_t in zip(states[1:], states, parts[1:], direct[1:], strict=False):
                gates = (previous @ weights).unflatten(-1, (-1, size))
                v.addcmul_(z_t, previous).add_(gates.mul_(part).sum(-2))
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
        to_c = by_gate(project(before, across(weight)), back)
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
    def backward(ctx, slope):
        x, on, weight, gates, (states, memories), now = ctx.saved_tensors
        size, shape = now.shape[-1], slope.shape[:-1]
        to_input, to_state = weight.split([weight.shape[-1] - size, size], -1)
        enter, forget, new, leave = gates.chunk(4, -1)
        inside, slope = now.tanh(), slope.flatten(0, -3).movedim(-2, 0)
        by_memory = [new * enter * (1 - enter), memories * forget * (1 - forget), enter * (1 - new * new)]
        factors = torch.stack(by_memory, -2), inside * leave * (1 - leave), leave * (1 - inside * inside), forget
        to_gates, to_before = torch.empty_like(gates), torch.empty_like(torch.stack([states, memories]))
        outs = to_gates, to_gates.unflatten(-1, (4, size))[..., :3, :], to_gates[..., 3 * size :], *to_before
        to_state_now = to_memory = torch.zeros_like(now[0])
        steps = zip(*(value.unbind() for value in (slope, on, *factors, *outs)), strict=True)
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
