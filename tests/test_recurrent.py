"""The recurrences and their derivatives by hand, against loops over steps that autograd differentiates."""

import pytest
import torch
from tiny import random
from torch.autograd import gradcheck, gradgradcheck

from models.recurrent import GRUScan, LSTMScan, Solve

SIZE = 3


def goes_on(*shape):
    """0 where a window starts, at random and in the first column."""
    on = (torch.rand(*shape, generator=torch.Generator().manual_seed(1)) > 0.3).double()
    on[..., 0] = 0
    return on


def gru(inputs, on, weight, bias):
    """torch's equations of a GRU, one step after the other."""
    state, states = torch.zeros_like(inputs[..., 0, :SIZE]), []
    for x, goes in zip(inputs.unbind(-2), on.unbind(-1), strict=True):
        before = state * goes[..., None]
        gates = before @ weight.mT + bias[..., None, :]
        (x_r, x_z, x_n), (s_r, s_z, s_n) = x.chunk(3, -1), gates.chunk(3, -1)
        update = torch.sigmoid(x_z + s_z)
        state = (1 - update) * torch.tanh(x_n + torch.sigmoid(x_r + s_r) * s_n) + update * before
        states.append(state)
    return torch.stack(states, -2)


def lstm(inputs, on, weight, bias, start):
    """torch's equations of an LSTM, one step after the other; a window starts from `start`."""
    state = memory = torch.zeros_like(inputs[..., 0, :1])
    states = []
    for x, goes in zip(inputs.unbind(-2), on[..., None].unbind(-2), strict=True):
        state, memory = (s + goes * (value - s) for s, value in zip(start, (state, memory), strict=True))
        enter, forget, new, leave = (torch.cat([x, state], -1) @ weight.T + bias).chunk(4, -1)
        memory = torch.sigmoid(forget) * memory + torch.sigmoid(enter) * torch.tanh(new)
        state = torch.sigmoid(leave) * torch.tanh(memory)
        states.append(state)
    return torch.stack(states, -2)


def cases():
    """(name, scan, plain loop or None, its differentiable arguments); T = 2 tasks with weights of their own, or none"""
    for lead in ((), (2,)):
        on = goes_on(*lead, 2, 5)
        given = random(*lead, 2, 5, 3 * SIZE), random(*lead, 3 * SIZE, SIZE), random(*lead, 3 * SIZE, seed=1)
        yield "gru", lambda x, *w, on=on: GRUScan.apply(x, on, *w), lambda x, *w, on=on: gru(x, on, *w), given
        given = random(*lead, 2, 5, 2), random(4 * SIZE, 2 + SIZE), random(4 * SIZE), random(2, SIZE)
        yield "lstm", lambda x, *w, on=on: LSTMScan.apply(x, on, *w), lambda x, *w, on=on: lstm(x, on, *w), given
        step = random(*lead, 2, 5, SIZE), random(*lead, 2, 5, 3 * SIZE), random(*lead, 2, 5, SIZE, seed=1)
        for back in (True, False):
            yield (
                "solve",
                lambda u, c, z, w, on=on, back=back: Solve.apply(u, c, z, on, w, back),
                None,
                (*step, random(*lead, 3 * SIZE, SIZE)),
            )


CASES = [pytest.param(*case, id=f"{case[0]}-{number}") for number, case in enumerate(cases())]


@pytest.mark.parametrize(("name", "scan", "plain", "given"), CASES)
def test_derivatives_equal_finite_differences(name, scan, plain, given):
    given = tuple(value.clone().requires_grad_() for value in given)
    assert gradcheck(scan, given, fast_mode=True)
    assert name == "lstm" or gradgradcheck(scan, given, fast_mode=True)


@pytest.mark.parametrize(("name", "scan", "plain", "given"), [case for case in CASES if case.values[2]])
def test_values_and_derivatives_equal_a_loop_over_steps(name, scan, plain, given):
    given, found = tuple(value.clone().requires_grad_() for value in given), []
    for run in (scan, plain):
        out = run(*given)
        first = torch.autograd.grad(out, given, random(*out.shape, seed=5), create_graph=name != "lstm")
        found.append([out, *first])
        if name != "lstm":
            found[-1] += torch.autograd.grad(sum(one.square().sum() for one in first), given)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("transposed", [True, False])
def test_solve_is_the_inverse_of_its_matrix(transposed):
    """u = (I - N) v, or its transpose, with N the block matrix of the steps' Jacobians."""
    steps, on = 4, goes_on(1, 4)
    u, z, c = random(1, steps, SIZE), random(1, steps, SIZE, seed=1), random(1, steps, 3 * SIZE)
    weight = random(3 * SIZE, SIZE)
    system = torch.eye(steps * SIZE, dtype=torch.float64)
    for t in range(1, steps):
        jacobian = torch.diag(z[0, t]) + (c[0, t].view(3, SIZE, 1) * weight.view(3, SIZE, SIZE)).sum(0)
        at = slice(t * SIZE, (t + 1) * SIZE), slice((t - 1) * SIZE, t * SIZE)
        system[at] -= on[0, t] * jacobian
    v = Solve.apply(u, c, z, on, weight, transposed)
    torch.testing.assert_close((system.T if transposed else system) @ v.flatten(), u.flatten())
