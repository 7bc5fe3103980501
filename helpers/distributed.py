"""C · Scaling up.

Made from notebooks/D_scaling.ipynb by helpers.export.
Edit the notebook, not this file.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from helpers.gpt import GPT
from helpers.pretrain import RunConfig
from helpers.training import is_main_process

__all__ = ["apply_fsdp", "full_tensor", "split_like", "full_state_dict", "check_sharding"]


# cell shard-model of notebooks/D_scaling.ipynb
def apply_fsdp(model: GPT, device: torch.device) -> GPT:
    """Split all weights of a model among the processes, in place (FSDP2).

    Each block is gathered when it is used; tables and the last norm, tied or not, are one more
    unit. A state dict of the model is whole again (see `full_state_dict`).

    Raises:
        ValueError: the processes have not been started (see `check_sharding`).
    """
    if not dist.is_initialized():
        raise ValueError("A model is sharded among processes that talk to each other: start them "
                         "with torchrun --nproc-per-node N -m helpers.pretrain ...")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


# cell whole-tensor of notebooks/D_scaling.ipynb
def full_tensor(value: object) -> object:
    """A sharded tensor put together, on the CPU of the first process; anything else as it is.

    All processes must call it. In the others the result has a shape and no memory.
    """
    if not isinstance(value, DTensor):
        return value
    whole = value.full_tensor()
    return whole.cpu() if is_main_process() else torch.empty_like(whole, device="meta")


# cell like-shards of notebooks/D_scaling.ipynb
def split_like(value: object, weight: Tensor) -> object:
    """A whole tensor split as a sharded weight of its shape is; anything else as it is."""
    if not isinstance(value, Tensor) or isinstance(value, DTensor) or value.shape != weight.shape:
        return value
    return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)


# cell whole-states of notebooks/D_scaling.ipynb
def full_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Let a sharded model and its optimizer give and take whole state dicts, as one process does.

    All processes must ask for them, and load them, at the same time.
    """
    def gather_model(module: nn.Module, state: dict, *rest: object) -> None:
        state.update({name: full_tensor(value) for name, value in state.items()})

    def split_model(module: nn.Module, state: dict, *rest: object) -> None:
        weights = dict(module.named_parameters(remove_duplicate=False))
        state.update({name: split_like(value, weights[name]) for name, value in state.items()
                      if name in weights})

    def gather_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> dict:
        moments = {i: {name: full_tensor(value) for name, value in kept.items()}
                   for i, kept in state["state"].items()}
        return state | {"state": moments}

    def split_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> dict:
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        moments = {i: {name: split_like(value, weights[i]) for name, value in kept.items()}
                   for i, kept in state["state"].items()}
        return state | {"state": moments}

    model.register_state_dict_post_hook(gather_model)
    model.register_load_state_dict_pre_hook(split_model)
    optimizer.register_state_dict_post_hook(gather_optimizer)
    optimizer.register_load_state_dict_pre_hook(split_optimizer)


# cell check-sharding-possible of notebooks/D_scaling.ipynb
def check_sharding(recipe: RunConfig) -> None:
    """Refuse to shard where it cannot be done.

    Raises:
        ValueError: there is only one process, or the optimizer needs whole matrices.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ValueError("--shard splits a model among processes, and there is one: start them "
                         "with torchrun --nproc-per-node N -m helpers.pretrain ...")
    if recipe.training.optimizer == "muon":
        raise ValueError("Muon needs whole matrices, and --shard leaves each process a slice of "
                         'them: use optimizer = "adamw", or leave --shard away.')
