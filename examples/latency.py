"""How fast a trained run serves: time to load, for one user, and users a second. The whole catalogue is scored.

python -m examples.latency log/ml-1m-bert4rec-melo
"""

import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python examples/latency.py`

import numpy as np
import torch

from options import Parser
from serving.recommender import Recommender, Support
from utils import run_script


def seconds(work):
    """How long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(run, n_single=100, n_batch=1024):
    """(seconds to load, median seconds for a single user, users a second on all cores)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loading = seconds(lambda: Recommender.load(run))
    recommender, rng = Recommender.load(run), np.random.default_rng(0)
    n_items, length = len(recommender.item_ids), recommender.options.max_seq_len - 1
    users = []
    for _ in range(n_batch):
        items = rng.choice(n_items, min(length, n_items // 2), replace=False) + 1
        ratings = rng.uniform(recommender.low, recommender.high, len(items)).astype(np.float32)
        users.append(Support(items, ratings))

    def single(user):
        recommender.adapt([(recommender.item_ids[i - 1], r) for i, r in zip(*user, strict=True)]).top(10)

    single(users[0])
    median = statistics.median(seconds(lambda user=user: single(user)) for user in users[:n_single])
    parts = [users[first : first + 32] for first in range(0, n_batch, 32)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(recommender.top, parts[:threads]))
        return loading, median, n_batch / seconds(lambda: list(pool.map(recommender.top, parts)))


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("run", help="a run's folder, or an exported file")
    loading, median, rate = measure(parser.parse_args(argv).run)
    print(f"load {loading:.2f} s; one user {median * 1e3:.1f} ms (median, one core); {rate:.0f} users a second")
    if hasattr(os, "getloadavg"):
        print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    run_script(main)
