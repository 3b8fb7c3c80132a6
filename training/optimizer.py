"""The outer optimizers, their learning rates, and the clipping of the meta-gradient."""

import math

import torch

from models.learner import TABLES

WARMUP = 50  # iterations over which all learning rates rise
CLIP_NORM = 5.0  # largest norm of a member's meta-gradient
WEIGHT_DECAY = 0.01  # decoupled, of the encoder of the joint head
EPSILON = 1e-6  # of Adam; with torch's 1e-8, gradients that are rounding errors give steps of full size


def build_optimizers(system, options):
    """AdamW for the parameters of all members and, with --sparse_items, SparseAdam for the item tables."""
    groups = [group for member in system.members for group in parameter_groups(member, options)]
    sparse = [group for group in groups if options.sparse_items and group["name"] == "items"]
    dense = [group for group in groups if not sparse or group["name"] != "items"]
    on_gpu = system.scale.device.type == "cuda"
    adam = torch.optim.AdamW(dense, eps=EPSILON, fused=True, capturable=on_gpu)
    return [adam, torch.optim.SparseAdam(sparse, eps=EPSILON)] if sparse else [adam]


def parameter_groups(member, options):
    """A member's parameters by the learning rate they have, each group with its name."""
    rates = {
        "encoder": options.outer_lr,
        "items": options.item_lr,
        "rates": options.learn_lr,
        "loss": options.lstm_lr if options.loss_network == "lstm" else options.loss_lr,
        "task_info": options.task_info_lr,
    }
    parameters = {name: [] for name in rates}
    for name, parameter in member.named_parameters():
        if parameter.requires_grad:
            parameters[group_name(name)].append(parameter)
    decay = {"encoder": WEIGHT_DECAY if options.head == "joint" else 0.0}
    return [
        {"name": name, "params": parameters[name], "lr": rate, "initial_lr": rate, "weight_decay": decay.get(name, 0.0)}
        for name, rate in rates.items()
        if parameters[name]
    ]


def group_name(parameter):
    """The group of `parameter_groups` that a meta-learner's parameter belongs to, by its name."""
    part, rest = parameter.split(".", 1)
    if part == "loss_network":
        return "task_info" if rest.startswith("shift.") else "loss"
    if part == "learner":
        return "items" if rest in TABLES else "encoder"
    return part


def learning_rates(optimizers, options, iteration):
    """The learning rates of all parameter groups in an iteration, a tensor.

    They rise for a short while, then fall as a cosine from 1 to min_outer_lr / outer_lr of what they are.
    """
    end = options.min_outer_lr / options.outer_lr
    done = min(1.0, iteration / max(1, options.num_train_iterations))
    factor = min(1.0, (iteration + 1) / WARMUP) * (end + (1 - end) * (1 + math.cos(math.pi * done)) / 2)
    return torch.tensor([group["initial_lr"] * factor for group in all_groups(optimizers)])


def all_groups(optimizers):
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def take_step(optimizers, rates, skip):
    """A step of all optimizers at these learning rates (G,), unless the tensor `skip` is true: then nothing changes.

    AdamW looks at `skip` on the device. SparseAdam cannot, so that the host waits for it.
    """
    for group, rate in zip(all_groups(optimizers), rates, strict=True):
        group["lr"] = rate
    adam, *sparse = optimizers
    adam.found_inf = skip.to(rates.dtype)
    adam.step()
    for optimizer in sparse:
        if not skip:
            optimizer.step()


@torch.no_grad()
def clip_gradient(parameters, limit=CLIP_NORM):
    """Scale gradients, dense or sparse, to a joint norm of at most `limit`; the norm before, as a tensor."""
    gradients = []
    for p in parameters:
        if p.grad is not None:
            p.grad = p.grad.coalesce() if p.grad.is_sparse else p.grad
            gradients.append(p.grad.values() if p.grad.is_sparse else p.grad)
    norm = torch.nn.utils.get_total_norm(gradients)
    torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp_max(1))
    return norm
