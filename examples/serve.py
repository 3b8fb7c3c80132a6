"""Serve a trained run over HTTP, with a page to try it on at the address that is printed.

    python -m examples.serve --run=log/ml-1m-bert4rec-melo --titles=Data/ml-1m/movies.dat --port=8000
    curl localhost:8000/recommend -H 'Content-Type: application/json' \\
        -d '{"users": [{"ratings": [[260, 5], [1196, 4]]}], "top": 3}'

docs/SERVING.md describes the requests. It keeps and logs nothing about users.
"""

import os
import socket
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python examples/serve.py`

import torch
import uvicorn

import options as option_module
from ratings.titles import read_titles
from serving.recommender import Recommender
from serving.service import Protocol, create_app
from utils import UserError, run_script, say


def parse(argv):
    parser = option_module.Parser(__doc__)
    add = option_module.group(parser, "service")
    add("run", None, str, "a run's folder, or an exported file", required=True)
    add("checkpoint_step", -1, option_module.count(-1, 10**12), "checkpoint of the run; -1 = the best of validation")
    add("titles", None, str, "file of item ids and titles, for the page")
    add("host", "127.0.0.1", str, "address to listen at; 0.0.0.0 = also from other machines")
    add("port", 8000, option_module.count(0, 65535), "port to listen at; 0 = any free one")
    add("device", "auto", str, "where to compute", choices=["auto", "cpu", "cuda"])
    return parser.parse_args(argv)


def listen(host, port):
    """A socket bound to the address. UserError where that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no such host"
        raise UserError(f"cannot listen at --host={host} --port={port} ({reason}): give other ones") from error
    return listener


def main(argv=None):
    options = parse(argv)
    recommender = Recommender.load(options.run, options.checkpoint_step, options.device)
    titles = read_titles(options.titles)
    torch.set_num_threads(1)  # requests run beside each other
    workers = (os.cpu_count() or 1) if recommender.device.type == "cpu" else 1
    app = create_app(recommender, titles, workers)
    with listen(options.host, options.port) as listener:
        host, port = listener.getsockname()[:2]
        say(f"serving {recommender.source} at http://{f'[{host}]' if ':' in host else host}:{port}/")
        config = uvicorn.Config(
            app, http=Protocol, log_level="warning", access_log=False, limit_concurrency=512,
            timeout_graceful_shutdown=5,
        )  # fmt: skip
        uvicorn.Server(config).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    run_script(main)
