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
    if not options.sparse_items:
        return [torch.optim.AdamW(groups, eps=EPSILON, fused=True)]
    tables = [group for group in groups if group["name"] == "items"]
    dense = [group for group in groups if group["name"] != "items"]
    return [torch.optim.AdamW(dense, eps=EPSILON, fused=True), torch.optim.SparseAdam(tables, eps=EPSILON)]


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


def set_learning_rates(optimizers, options, iteration):
    """Set all learning rates for an iteration: a short rise, then a cosine from 1 to min_outer_lr / outer_lr."""
    end = options.min_outer_lr / options.outer_lr
    done = min(1.0, iteration / max(1, options.num_train_iterations))
    factor = min(1.0, (iteration + 1) / WARMUP) * (end + (1 - end) * (1 + math.cos(math.pi * done)) / 2)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


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
