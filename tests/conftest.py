"""Settings of all tests."""

import torch

torch.set_num_threads(1)  # at these sizes, threads cost more than they give
