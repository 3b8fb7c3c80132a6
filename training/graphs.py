"""A function of tensors on a GPU as CUDA graphs: its thousands of launches become one."""

import torch
from torch.utils import _pytree as pytree

WARM_UP = 3  # first calls, which run as they are: libraries and optimizer make what they keep


class Graphs:
    """Calls a function that reads no value on the host, and replays it as one graph for each set of shapes.

    What it changes must be there before it is captured: parameters, an optimizer's moments. Graphs share their memory,
    so that other tensors it makes, such as gradients, last until the next call.
    """

    def __init__(self, device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool, self.calls, self.captured = torch.cuda.graph_pool_handle(), 0, {}

    def __call__(self, function, *arguments):
        """Call the function, always the same, with arguments made of tensors on the host; it returns nothing."""
        tensors, layout = pytree.tree_flatten(arguments)
        tensors, key = [tensor.pin_memory() for tensor in tensors], (layout, tuple(t.shape for t in tensors))
        self.calls += 1
        if self.calls <= WARM_UP:
            return self.warm_up(function, tensors, layout)
        if key not in self.captured:
            self.captured[key] = self.capture(function, tensors, layout)
        graph, buffers = self.captured[key]
        for buffer, tensor in zip(buffers, tensors, strict=True):
            buffer.copy_(tensor, non_blocking=True)  # while the graph before still runs
        graph.replay()

    def warm_up(self, function, tensors, layout):
        """Call the function as it is, on the stream that graphs are captured on."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            function(*pytree.tree_unflatten([tensor.to(self.device) for tensor in tensors], layout))
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def capture(self, function, tensors, layout):
        """A graph of the function and the buffers that it reads. Capturing computes nothing."""
        graph, buffers = torch.cuda.CUDAGraph(), [tensor.to(self.device) for tensor in tensors]
        with torch.cuda.graph(graph, self.pool, self.stream):
            function(*pytree.tree_unflatten(buffers, layout))
        return graph, buffers
