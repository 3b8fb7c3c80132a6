"""Settings of all tests."""

import signal

import torch

torch.set_num_threads(1)  # at these sizes, threads cost more than they give

# Started in the background or by nohup, the suite would inherit ignored signals, which a training respects.
for name, handler in (("SIGINT", signal.default_int_handler), ("SIGTERM", signal.SIG_DFL), ("SIGHUP", signal.SIG_DFL)):
    if signal.getsignal(getattr(signal, name, signal.SIGINT)) == signal.SIG_IGN:
        signal.signal(getattr(signal, name), handler)
