"""D · Scaling: data, optimizers, and many processes.

Made from notebooks/D_scaling.ipynb by helpers.export.
Edit the notebook, not this file.
The same notebook makes helpers.pretrain, helpers.corpus, helpers.optim, helpers.inference.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict,
                                                     get_optimizer_state_dict,
                                                     set_model_state_dict,
                                                     set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from helpers.checkpoint import (Checkpoint, GracefulInterrupt, checkpoint_contents,
                                write_checkpoint)
from helpers.common import set_seed
from helpers.gpt import GPT
from helpers.training import TrainState, unwrap_model

__all__ = [
    "is_main_process",
    "distributed_loss",
    "init_distributed",
    "seed_rank",
    "main_process_first",
    "DistributedInterrupt",
    "apply_fsdp",
    "parameter_names",
    "full_state_dict",
    "load_full_state_dict",
    "random_states",
    "set_random_states",
    "DistributedCheckpoint",
    "check_fsdp",
    "gather_model",
]


# cell is-main-process of notebooks/D_scaling.ipynb
def is_main_process() -> bool:
    """Whether this process is the one that prints and writes files: the first, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


# cell distributed-loss of notebooks/D_scaling.ipynb
def distributed_loss(loss_fn: Callable) -> Callable:
    """A loss function whose values are those of all processes together, the same in each.

    Sum and count are global; the gradient is the local one times the world size, so that the mean
    over the processes, which DDP and FSDP compute, is the gradient of the global sum. One
    process gets the loss function as it is.
    """
    if not dist.is_initialized():
        return loss_fn

    def global_loss(model: nn.Module, batch: object) -> tuple[Tensor, int]:
        loss, count = loss_fn(model, batch)
        totals = torch.stack([loss.detach(), torch.full_like(loss, count)]).double()
        dist.all_reduce(totals)                        # sums over the processes
        scaled = loss * dist.get_world_size()
        return totals[0].float() + (scaled - scaled.detach()), int(totals[1])

    return global_loss


# cell init-distributed of notebooks/D_scaling.ipynb
def init_distributed() -> bool:
    """Join the other processes that torchrun started, if it did; each takes a GPU of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return False
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group()
    return True


# cell seed-rank of notebooks/D_scaling.ipynb
def seed_rank(seed: int) -> None:
    """Seed the random numbers of this process, other ones on each rank; call it after the model."""
    set_seed(seed + (dist.get_rank() if dist.is_initialized() else 0))


# cell main-process-first of notebooks/D_scaling.ipynb
@contextmanager
def main_process_first(timeout: timedelta = timedelta(days=7)) -> Iterator[None]:
    """Within it the first process works while the others wait, longer than a process group would.

    Afterwards the others come in, and find its work done.
    """
    waiting = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
    if waiting is not None and not is_main_process():
        dist.barrier(waiting)
    yield
    if waiting is not None and is_main_process():
        dist.barrier(waiting)


# cell distributed-interrupt of notebooks/D_scaling.ipynb
class DistributedInterrupt(GracefulInterrupt):
    """Let all processes stop after the same step when any of them was interrupted."""

    def on_step_end(self, state: TrainState) -> None:
        """Take the flag of any process for all."""
        flag = torch.tensor(float(self.raised), device=next(state.model.parameters()).device)
        if dist.is_initialized():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if flag:
            state.should_stop = True               # a stop that is asked for is never taken back

    def _note(self, number: int, frame: object) -> None:
        if self.raised:
            raise KeyboardInterrupt
        self.raised = True                             # to be agreed on, at the end of the step


# cell apply-fsdp of notebooks/D_scaling.ipynb
def apply_fsdp(model: GPT, device: torch.device) -> GPT:
    """Shard all parameters of a model over the processes, in place (FSDP2).

    Each block is gathered when it is used; embeddings and last norm are one more unit.

    Raises:
        ValueError: the processes have not been started (see `check_fsdp`).
    """
    if not dist.is_initialized():
        raise ValueError("A model is sharded over processes that talk to each other: start them "
                         "with torchrun --nproc-per-node N -m helpers.pretrain ...")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


# cell parameter-names of notebooks/D_scaling.ipynb
def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The name of each parameter of an optimizer, in the order of its state dict."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


# cell full-state-dict of notebooks/D_scaling.ipynb
def full_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """The whole state dicts of a sharded model and its optimizer, as one process would have them.

    They are put together in the first process, on the CPU; the others get empty ones. All
    processes must call.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    moments = get_optimizer_state_dict(model, optimizer, options=options)
    if not is_main_process():
        return {"model": {}, "optimizer": {}}
    number = {name: i for i, name in enumerate(parameter_names(model, optimizer))}
    groups = [group | {"params": [number[name] for name in group["params"]]}
              for group in moments["param_groups"]]
    state = {number[name]: kept for name, kept in moments["state"].items()}
    return {"model": weights, "optimizer": {"state": state, "param_groups": groups}}


# cell load-full-state-dict of notebooks/D_scaling.ipynb
def load_full_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer,
                         contents: dict[str, dict]) -> None:
    """Cut whole state dicts for a sharded model and its optimizer; all processes must call."""
    names, options = parameter_names(model, optimizer), StateDictOptions(full_state_dict=True)
    saved = contents["optimizer"]
    groups = [group | {"params": [names[i] for i in group["params"]]}
              for group in saved["param_groups"]]
    state = {names[i]: kept for i, kept in saved["state"].items()}
    set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups},
                             options=options)
    set_model_state_dict(model, contents["model"], options=options)


# cell random-states of notebooks/D_scaling.ipynb
def random_states() -> list[dict[str, Tensor]]:
    """The states of the random generators of all processes, in the order of their ranks."""
    own = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()
    states = [own] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(states, own)
    return states


# cell set-random-states of notebooks/D_scaling.ipynb
def set_random_states(states: list[dict[str, Tensor]], step: int) -> None:
    """Give each process its own state back; new seeds where their number has changed."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if len(states) == world_size:
        own = states[dist.get_rank() if dist.is_initialized() else 0]
        torch.set_rng_state(own["cpu"])
        if torch.cuda.is_available() and "cuda" in own:
            torch.cuda.set_rng_state(own["cuda"])
    elif dist.is_initialized():
        seed_rank(step * world_size)


# cell distributed-checkpoint of notebooks/D_scaling.ipynb
class DistributedCheckpoint(Checkpoint):
    """`Checkpoint` for one process or several, whose model is copied (DDP) or sharded (FSDP).

    Args:
        path, every: see `Checkpoint`.
        minutes: write it also when so much time has passed since the last one.
        keep_at: a step after which the checkpoint is also kept as `constant.pt`, to go on from.
    """

    def __init__(self, path: str | Path, every: int | None = None, *,
                 minutes: float | None = None, keep_at: int | None = None) -> None:
        super().__init__(path, every)
        self.minutes, self.keep_at, self.saved = minutes, keep_at, time.monotonic()

    def on_step_end(self, state: TrainState) -> None:
        """Save where it is due, by steps or by the clock of the first process."""
        if state.step == self.keep_at:
            contents = self.collect(state)
            if is_main_process():
                write_checkpoint(self.path.with_name("constant.pt"), contents)
        late = self.minutes and time.monotonic() - self.saved > 60 * self.minutes
        if self.minutes and dist.is_initialized():
            flags = [late]
            dist.broadcast_object_list(flags, src=0)
            late = flags[0]
        if late and state.step < state.total_steps:
            self.save(state)
        else:
            super().on_step_end(state)

    def collect(self, state: TrainState) -> dict:
        """What one process would save, and the random state of each rank."""
        contents, model = checkpoint_contents(state), unwrap_model(state.model)
        if any(isinstance(p, DTensor) for p in model.parameters()):
            contents |= full_state_dict(model, state.optimizer)
        self.saved = time.monotonic()
        return contents | {"rank_rng": random_states()}

    def write(self, contents: dict) -> None:
        """The first process writes."""
        if is_main_process():
            super().write(contents)

    def restore(self, state: TrainState, contents: dict) -> None:
        """Put everything back; each rank takes its own random state."""
        model = unwrap_model(state.model)
        if any(isinstance(p, DTensor) for p in model.parameters()):
            load_full_state_dict(model, state.optimizer, contents)
            contents = contents | {"model": model.state_dict(),
                                   "optimizer": state.optimizer.state_dict()}
        super().restore(state, contents)
        set_random_states(contents.get("rank_rng", []), state.step)


# cell check-fsdp of notebooks/D_scaling.ipynb
def check_fsdp(optimizer: str) -> None:
    """Refuse to shard where it cannot be done.

    Raises:
        ValueError: there is only one process, or the optimizer needs whole matrices.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ValueError("--fsdp shards a model over processes, and there is one: start them "
                         "with torchrun --nproc-per-node N -m helpers.pretrain ...")
    if optimizer == "muon":
        raise ValueError("Muon needs whole matrices, and --fsdp leaves each process a slice of "
                         'them: use optimizer = "adamw", or leave --fsdp away.')


# cell gather-model of notebooks/D_scaling.ipynb
def gather_model(model: GPT) -> GPT:
    """A sharded model put together, on the CPU of the first process; the others get no weights."""
    weights = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    with torch.device("meta"):
        whole = GPT(model.config)
    if weights:
        whole.load_state_dict(weights, assign=True)
        whole.tie_weights()
    return whole
