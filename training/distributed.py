"""Several ranks that train one system together, started by torchrun; without it, the one process there is.

Every rank draws the same tasks and takes its share; gradients are summed over all ranks, so that the parameters stay
the same everywhere. Rank 0 alone prints, logs, saves and locks. torchrun supervises the ranks. One that is killed or
gives up closes its connections, which ends what the others do with it; one that hangs ends it after `TIMEOUT`.
"""

import contextlib
import os
import sys
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

import utils
from utils import UserError

TIMEOUT = timedelta(hours=1)  # how long ranks wait for one that reads, fits or saves
store = None  # of the ranks' small common values, once they are connected


class RankLost(Exception):
    """Another rank has ended or hangs."""


def rank():
    return dist.get_rank() if store else 0


def world_size():
    return dist.get_world_size() if store else 1


def is_first():
    return rank() == 0


# -----------------------------------------------------------------------------
# beginning and ending


def run_script(main):
    """`utils.run_script` for a script that torchrun may start in several ranks.

    A process has one CPU thread, as torchrun gives it, unless OMP_NUM_THREADS is set. Operations are small: where other
    programs run, each waits for its slowest thread. Two threads took 20 times as long on two cores with a load of 10, a
    sixth less than one on idle cores.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    utils.run_script(main if alone else lambda: run_rank(main), needs_output=False)


def run_rank(main):
    """Run `main()` as one rank of several; the exit status. An error that all ranks meet is printed once."""
    join()
    stderr = sys.stderr
    if not is_first():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        status = main()
        dist.destroy_process_group()
        return status
    except RankLost as error:
        status, words = 1, f"error: {error}"
    except KeyboardInterrupt:
        status, words = 130, "interrupted"
    except Exception as error:
        text = utils.explain(error)
        status, words = (2, f"error: {text}") if text else (1, traceback.format_exc().rstrip())
    first = claim_end(status)
    if first == (rank(), status):
        print(words, file=stderr, flush=True)
    return first[1]


def join():
    """Connect with the other ranks, as torchrun's environment says; UserError where they are not found."""
    global store
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        found, number, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # --max_restarts keeps the store, addresses and all
        found = dist.PrefixStore(f"attempt{attempt}", found)
        dist.init_process_group(backend, store=found, rank=number, world_size=count, timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"WORLD_SIZE is set, but this rank does not find the others ({first_line(error)}): start with torchrun, "
            "and give all machines the address and a free port of the first"
        ) from error
    store = found


def claim_end(status):
    """(rank, exit status) of the rank that was first to end the run by a failure: this one, or one before it."""
    mine = f"{rank()} {status}"
    with contextlib.suppress(RuntimeError):  # the store may be gone with its machine
        mine = store.compare_set("end", "", mine).decode()
    return tuple(map(int, mine.split()))


def first_line(error):
    """The first sentence of an error of torch.distributed, without the place in its source."""
    return str(error).strip().split("\n")[0].rpartition("] ")[2].split(". ")[0][:150]


# -----------------------------------------------------------------------------
# working together; in one process, these cost nothing


@contextlib.contextmanager
def connection():
    """Raise `RankLost` where what is done with the other ranks fails."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(
            f"another rank was killed, ran out of memory or hangs ({first_line(error)}); "
            "what was saved is whole: start all again with --resume"
        ) from error


@contextlib.contextmanager
def first_of_machine_first():
    """The first rank of each machine does what is inside before the other ranks of that machine do."""
    waits = int(os.environ.get("LOCAL_RANK", 0)) > 0
    if waits:
        barrier()
    yield
    if not waits:
        barrier()


def barrier():
    """Wait for all ranks."""
    gather_objects(None)


def max_over_ranks(*numbers):
    """The largest value of each of these whole numbers over all ranks."""
    tensor = torch.tensor(numbers)
    if world_size() > 1:
        with connection():
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tuple(tensor.tolist())


def broadcast_object(value):
    """The value of rank 0, which must pickle."""
    values = [value]
    if world_size() > 1:
        with connection():
            dist.broadcast_object_list(values)
    return values[0]


def gather_objects(value):
    """A list of the values of all ranks, in their order."""
    values = [value] * world_size()
    if world_size() > 1:
        with connection():
            dist.all_gather_object(values, value)
    return values


def broadcast_tensors(tensors):
    """Overwrite tensors with those of rank 0."""
    if world_size() > 1:
        with connection():
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)


def sum_gradients(system, rows, figures):
    """Sum the gradients of a system and `figures` (n,) over all ranks, in one all_reduce; the summed figures.

    Where the item tables' gradients are sparse, they are in some of the `rows` (r,), ascending and the same for all
    ranks; these alone are sent. A gradient that no rank has stays None.
    """
    parameters = [p for p in system.parameters() if p.requires_grad]
    tables = [table for member in system.members for table in member.learner.tables().values()]
    sparse = set() if rows is None else {id(table) for table in tables}
    rows = None if rows is None else rows.to(figures.device)
    present = figures.new_tensor([p.grad is not None for p in parameters])
    parts = [figures, present, *(flat_gradient(p, rows if id(p) in sparse else None) for p in parameters)]
    buffer = torch.cat(parts)
    with connection():
        dist.all_reduce(buffer)
    figures, present, *parts = buffer.split([len(part) for part in parts])
    for p, part, holders in zip(parameters, parts, present.tolist(), strict=True):
        if not holders:
            continue
        if id(p) in sparse:
            values = part.view(len(rows), *p.shape[1:])
            p.grad = torch.sparse_coo_tensor(rows[None], values, p.shape, is_coalesced=True, check_invariants=False)
        elif p.grad is None:
            p.grad = part.view_as(p)
        else:
            p.grad.copy_(part.view_as(p))
    return figures


def flat_gradient(p, rows):
    """The gradient of a parameter as a vector; for a table with a sparse gradient, only its `rows`."""
    if rows is None:
        return (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
    values = p.new_zeros(len(rows), *p.shape[1:])
    if p.grad is not None:
        gradient = p.grad.coalesce()
        values[torch.searchsorted(rows, gradient.indices()[0])] = gradient.values()
    return values.flatten()
