"""Several processes that train one system together, started by torchrun; without it, the one there is.

Every process draws the same tasks and takes its share; gradients are summed over all, so that the parameters stay
the same everywhere. Process 0 alone prints, logs, saves and locks. No process outlives another's untimely end: one
that is killed closes its connections, one that is lost with its machine stops saying that it lives, and one that
gives up leaves word in the store that all are connected to.
"""

import contextlib
import os
import re
import threading
import time
import traceback
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

import utils
from utils import UserError

SILENCE = 45  # seconds without a sign of life after which a process counts as lost
MEETING = timedelta(minutes=5)  # how long one waits for the others at the beginning
PATIENCE = timedelta(hours=12)  # and later for one that lives: it reads or saves
LAST_WORDS = 10.0  # seconds that process 0 has to write what it is writing when another has given up
NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


class Place(NamedTuple):
    """This process among all of the run, and on its machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    machine: int = 0
    store: dist.Store | None = None  # small values that all processes see
    voice: int = 2  # the descriptor that it says its last words to


class Ended(Exception):
    """The run has ended, which has been said; its value is the exit status."""


place = Place()


def rank():
    return place.rank


def count():
    return place.count


def is_first():
    """Whether this is process 0."""
    return place.rank == 0


def share(n):
    """The part first:end of n tasks or users that this process takes."""
    return n * place.rank // place.count, n * (place.rank + 1) // place.count


# -----------------------------------------------------------------------------
# beginning and ending


def run_script(main):
    """`utils.run_script` for a script that torchrun may start several times: what all would say is said once."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    utils.run_script(main if alone else lambda: run_together(main))


def run_together(main):
    """Run `main()` as one process of several; the exit status."""
    join()
    if not is_first():
        be_quiet()
    done = threading.Event()
    heard = dict.fromkeys(range(place.count), (None, time.monotonic()))
    threads = [threading.Thread(target=task, args=(done, heard), daemon=True) for task in (exchange, watch)]
    for thread in threads:
        thread.start()
    try:
        status = main()
    except UserError as error:
        status = end(2, f"error: {error}")
    except KeyboardInterrupt:
        status = end(130, "interrupted")
    except Ended as ended:
        status = ended.args[0]
    except Exception:
        status = end(1, traceback.format_exc())
    done.set()
    for thread in threads:
        thread.join(5)
    leave(status)
    return status


def join():
    """Find the other processes, as the environment says; UserError where they do not come."""
    global place
    try:
        me, everyone, address, port = (os.environ[name] for name in NAMES)
        place = Place(
            int(me), int(everyone), int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("GROUP_RANK", me))
        )
        store, _, _ = next(dist.rendezvous("env://", timeout=MEETING))
    except KeyError as error:
        raise UserError(f"WORLD_SIZE is set, but {error.args[0]} is not: start with torchrun, or set both") from error
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"process {me} of {everyone} does not find the others at {address}:{port} ({first_line(error)}): start all "
            f"{everyone}, with the address and a free port of the first one's machine"
        ) from error
    store.set_timeout(PATIENCE)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    place = place._replace(store=dist.PrefixStore(f"melo/{attempt}", store))
    place.store.set(f"alive/{place.rank}", "0")


def first_line(error):
    """The first sentence of an error of torch.distributed, without the place in its source."""
    return re.sub(r"^\[[^]]*\] ", "", str(error).strip()).split("\n")[0].split(". ")[0][:150]


def be_quiet():
    """Print nothing from here on but what `end` says; torch's own code, too, complains when a connection ends."""
    global place
    place = place._replace(voice=os.dup(2))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def end(status, words, store=None):
    """Say why the run ends, unless another process has said so before; the exit status of the one that did."""
    mine = f"{place.rank} {status}"
    try:
        said = (store or place.store).compare_set("end", "", mine).decode()
    except RuntimeError:  # the store is gone: nobody can be asked
        said = mine
    if said == mine:
        say(words)
    return int(said.split()[1])


def say(words):
    with contextlib.suppress(OSError):
        os.write(place.voice, f"{words.rstrip()}\n".encode())


def exchange(done, heard):
    """Say every second that this process lives, until it is `done`; keep in `heard` when each was last heard of.

    heard: {process: (its last sign of life, when that was new)}. Ends this process where another has given up.
    """
    store = place.store.clone()  # a connection of its own: the other may be waiting
    keys = [f"alive/{other}" for other in range(place.count)]
    beat = 0
    while not done.wait(1):
        beat += 1
        try:
            store.set(keys[place.rank], str(beat))
            signs, over = store.multi_get(keys), store.check(["end"])
        except RuntimeError:
            if done.wait(5):  # whoever computes with process 0 has noticed by then
                return
            say(f"error: {lost('process 0 has ended, or the connection to it')}")
            os._exit(1)
        if over:
            if done.wait(LAST_WORDS if is_first() else 1):
                return
            store.set(keys[place.rank], "left")
            os._exit(end(1, "", store))
        for other, sign in enumerate(signs):
            if sign != heard[other][0]:
                heard[other] = sign, time.monotonic()


def watch(done, heard):
    """End this process where another has not been heard of for long, though it has not left."""
    while not done.wait(1):
        for other, (sign, when) in heard.items():
            if sign != b"left" and time.monotonic() - when > SILENCE:
                words = f"error: {lost(f'process {other} of {place.count} has been silent for {SILENCE:g} s')}"
                if other == 0:  # and the store may be silent with it
                    say(words)
                    os._exit(1)
                os._exit(end(1, words, place.store.clone()))


def lost(what):
    return f"{what}; what was saved is whole: start all processes again with --resume"


def leave(status):
    """Part from the others; process 0 waits for them where it keeps the store."""
    with contextlib.suppress(RuntimeError):
        place.store.set(f"alive/{place.rank}", "left")
        keys = [f"alive/{other}" for other in range(place.count)]
        if is_first() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            until = time.monotonic() + 4  # a lost one will not come
            while time.monotonic() < until and set(place.store.multi_get(keys)) != {b"left"}:
                time.sleep(0.05)
    if status == 0 and dist.is_initialized():
        dist.destroy_process_group()


# -----------------------------------------------------------------------------
# working together; alone, these cost nothing


def connect(device):
    """Connect all processes for what follows, computing on `device`."""
    if place.count > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        with others():
            dist.init_process_group(
                backend, store=place.store, rank=place.rank, world_size=place.count, timeout=PATIENCE
            )


@contextlib.contextmanager
def others():
    """Raise `Ended` where what is done with the others fails, and say so if nobody has."""
    try:
        yield
    except RuntimeError as error:
        what = f"another process has ended without a word, killed or out of memory ({first_line(error)})"
        raise Ended(end(1, f"error: {lost(what)}")) from error


@contextlib.contextmanager
def one_by_machine():
    """The first process of each machine does what is inside before the others of that machine do."""
    key = f"ready/{place.machine}"
    if place.local_rank:
        with others():
            place.store.wait([key])
    yield
    if place.count > 1 and not place.local_rank:
        place.store.set(key, "")


def barrier():
    """Wait for all processes."""
    largest(0)


def largest(*numbers):
    """Each of these whole numbers as the largest that any process gives."""
    if place.count == 1:
        return numbers
    tensor = torch.tensor(numbers)
    with others():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tuple(tensor.tolist())


def from_first(value):
    """What process 0 gives, a value that pickles."""
    if place.count == 1:
        return value
    values = [value]
    with others():
        dist.broadcast_object_list(values)
    return values[0]


def from_all(value):
    """What each process gives, in their order: a list."""
    if place.count == 1:
        return [value]
    values = [None] * place.count
    with others():
        dist.all_gather_object(values, value)
    return values


def copy_first(tensors):
    """Overwrite tensors with those of process 0."""
    if place.count > 1:
        for tensor in tensors:
            with others():
                dist.broadcast(tensor, 0)


def sum_gradients(parameters, tables, rows, figures, meanwhile):
    """Sum the gradients of `parameters` and `figures` (n,) over all processes, in one all_reduce; the summed figures.

    tables: those of the parameters whose gradients are sparse, in some of the `rows` (r,), ascending and the same
    for all processes; these alone are sent. A gradient that no process has stays None. `meanwhile` is called while the
    sum is on its way.
    """
    sparse = {id(table) for table in tables}
    present = figures.new_tensor([p.grad is not None for p in parameters])
    parts = [figures, present, *(flat_gradient(p, rows if id(p) in sparse else None) for p in parameters)]
    buffer = torch.cat(parts)
    with others():
        sending = dist.all_reduce(buffer, async_op=True)
    meanwhile()
    with others():
        sending.wait()
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
    """The gradient of a parameter, flat; of a table's sparse one, the `rows` alone."""
    if rows is None:
        return (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
    values = p.new_zeros(len(rows), *p.shape[1:])
    if p.grad is not None:
        gradient = p.grad.coalesce()
        values[torch.searchsorted(rows, gradient.indices()[0])] = gradient.values()
    return values.flatten()
