"""Derivatives written by hand: values and both derivatives against plain operations and finite differences."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from benchmark import NAIVE
from models import kernels

SIZE = 3


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def goes_on(*shape):
    """0 where a window starts, at random and in the first column."""
    on = (torch.rand(*shape, generator=torch.Generator().manual_seed(1)) > 0.3).double()
    on[..., 0] = 0
    return on


def cases():
    """(kernel, its differentiable arguments, a function that puts the others in)."""
    for lead in ((), (2,)):
        on = goes_on(*lead, 2, 5)
        recurrent = random(*lead, 2, 5, 3 * SIZE), random(*lead, 3 * SIZE, SIZE), random(*lead, 3 * SIZE, seed=1)
        yield kernels.GRUScan, recurrent, lambda x, w, b, on=on: (x, on, w, b)
        lstm = random(*lead, 2, 5, 2), random(4 * SIZE, 2 + SIZE), random(4 * SIZE), random(2, SIZE)
        yield kernels.LSTMScan, lstm, lambda x, w, b, start, on=on: (x, on, w, b, start)
        step = random(*lead, 2, 5, SIZE), random(*lead, 2, 5, 3 * SIZE), random(*lead, 2, 5, SIZE, seed=1)
        for transposed in (True, False):
            arguments = (*step, random(*lead, 3 * SIZE, SIZE))
            yield kernels.Solve, arguments, lambda u, c, z, w, on=on, t=transposed: (u, c, z, on, w, t)
        pairs = random(*lead, 2, 5, SIZE), random(*lead, 2, 5, SIZE, seed=1), random(*lead, SIZE)
        mask = (torch.rand(*lead, 2, 5, 5, generator=torch.Generator().manual_seed(3)) > 0.5).tril()
        yield kernels.PairScores, pairs, lambda q, k, v, mask=mask: (q, k, v, mask)
        yield kernels.PairScores, pairs[:2] + (random(SIZE),), lambda q, k, v, mask=mask: (q, k, v, mask)
    norm = random(2, 4, 5, SIZE), random(2, SIZE), random(2, SIZE, seed=1)
    yield kernels.Norm, norm, lambda x, w, b: (x, w, b, 1e-5)
    yield kernels.Gelu, (random(4, SIZE),), lambda x: (x,)
    affine = random(2, 3, 4, SIZE), random(2, 5, SIZE), random(2, 5)
    yield kernels.Affine, affine, lambda x, w, b: (x, w, b, False)
    for across in (False, True):
        yield kernels.Affine, affine[:2], lambda x, w, across=across: (x, w, None, across)
    yield kernels.Dot, (random(2, 3, 4, SIZE), random(2, SIZE)), lambda x, w: (x, w)
    for lead in ((), (2,)):
        yield kernels.SplitHeads, (random(2, 12, 3, 4), random(*lead, 12)), lambda x, b: (x.transpose(1, 2), b, 2)
    for length in (4, kernels.VECTOR + 1):  # two ways to take the softmax
        seen = torch.rand(2, length, length, generator=torch.Generator().manual_seed(2)) > 0.3
        hide = (~(seen | torch.eye(length, dtype=torch.bool))).double() * torch.finfo(torch.float64).min
        streams = tuple(random(4, SIZE, length, seed=seed) for seed in range(3))  # two heads a row
        yield kernels.Attend, streams, lambda q, k, v, hide=hide: (q, k, v, hide)


CASES = list(cases())
FIRST_ORDER = (kernels.LSTMScan,)


@pytest.mark.parametrize(("kernel", "given", "arguments"), CASES)
def test_derivatives_equal_finite_differences(kernel, given, arguments):
    def run(*given):
        return kernel.apply(*arguments(*given))

    assert gradcheck(run, given, fast_mode=True)
    if kernel not in FIRST_ORDER:
        assert gradgradcheck(run, given, fast_mode=True)


@pytest.mark.parametrize(("kernel", "given", "arguments"), [case for case in CASES if case[0] in NAIVE])
def test_values_and_derivatives_equal_plain_operations(kernel, given, arguments):
    found = []
    for run in (kernel.apply, NAIVE[kernel]):
        out = run(*arguments(*given))
        out = out if isinstance(out, torch.Tensor) else torch.stack(out)
        slope = random(*out.shape, seed=5)
        first = torch.autograd.grad(out, given, slope, create_graph=kernel not in FIRST_ORDER)
        if kernel in FIRST_ORDER:
            found.append((out, first))
            continue
        second = torch.autograd.grad(sum(one.square().sum() for one in first), (*given, slope), materialize_grads=True)
        found.append((out, first, second))
    torch.testing.assert_close(*found)


class Operations(TorchDispatchMode):
    """The names of the operations that are done while entered."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_pairs_are_counted_once():
    """Each count of what holds in a mask waits for a GPU, and inner steps are many."""
    given, arguments = next((given, arguments) for kernel, given, arguments in CASES if kernel is kernels.PairScores)
    with Operations() as operations:
        first = torch.autograd.grad(kernels.PairScores.apply(*arguments(*given)).sum(), given, create_graph=True)
        torch.autograd.grad(sum(one.square().sum() for one in first), given)
    counting = {"nonzero", "index", "index_put_", "masked_select", "masked_scatter_", "_local_scalar_dense"}
    assert [name for name in operations.names if name in counting] == ["nonzero"]


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
        system[at] -= on[0, t] * jacobian.detach()
    v = kernels.Solve.apply(u, c, z, on, weight, transposed)
    torch.testing.assert_close((system.T if transposed else system) @ v.flatten(), u.flatten())
