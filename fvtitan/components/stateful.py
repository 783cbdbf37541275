"""What a checkpoint is made of: wrappers that give models, optimizers, schedulers and generators a `state_dict`.

A state is a dict, nested as one likes, of tensors and of values JSON can hold. Sharded tensors are DTensors and can be
loaded on any number of ranks; plain tensors are taken to be equal on all ranks.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fvtitan.distributed.utils import local_tensor, rank_and_world, reshard
from fvtitan.errors import UserError, shortened


class Stateful(Protocol):
    """An object a checkpoint holds. `load_template(saved)` is optional: it returns the tensors to read into, given the
    JSON part of what was saved, and must not change the object; without it `state_dict()` is the template."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def check_saved(here: Any, saved: Any, name: str) -> None:
    """Raise `UserError` unless what was saved as `name` is of the kind of what is there now: objects with the same keys (those
    with an underscore are torch's own, and come and go), lists as long, values of the same type. Tensors do not count."""
    if isinstance(here, Mapping) and isinstance(saved, Mapping):
        here, saved = ({k: v for k, v in tree.items() if not isinstance(v, Tensor)} for tree in (here, saved))
        for key in sorted(here.keys() ^ saved.keys()):
            if not key.startswith("_"):
                raise UserError(f"{name} {'lacks' if key in here else 'also has'} {shortened(repr(key))}")
        for key in here.keys() & saved.keys():
            check_saved(here[key], saved[key], f"{name}.{key}")
    elif isinstance(here, list | tuple) and isinstance(saved, list):
        if len(here) != len(saved):
            raise UserError(f"{name} has {len(saved)} values there, {len(here)} here")
        for index, (ours, theirs) in enumerate(zip(here, saved, strict=True)):
            check_saved(ours, theirs, f"{name}[{index}]")
    elif not (type(here) is type(saved) or here is None or (saved is None and isinstance(here, float))):
        if not (isinstance(here, float) and type(saved) is int):
            raise UserError(f"{name} is {shortened(repr(saved))}, which is not a {type(here).__name__}")


class ModelState:
    """A module's parameters and buffers under their clean names, sharded as they are; or `parameters` of it alone, under the
    names they have there: an adapter's."""

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter] | None = None) -> None:
        self.module = module
        self.parameters = parameters

    def state_dict(self) -> dict[str, Any]:
        reshard(self.module)  # writes into sharded parameters are lost while they are gathered
        if self.parameters is None:
            return get_model_state_dict(self.module)
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        reshard(self.module)
        if self.parameters is None:
            set_model_state_dict(self.module, state_dict, options=StateDictOptions(strict=True))
            return
        for name, parameter in self.parameters.items():
            local_tensor(parameter.detach()).copy_(local_tensor(state_dict[name]))


class OptimizerState:
    """An optimizer's state by parameter name: `state.<name>.exp_avg` is sharded like the parameter.

    Reading it changes nothing and fires no hook: a parameter that was never stepped has no entry, and has none again
    after loading (torch's own `get_optimizer_state_dict` makes a fake step instead). Hyper-parameters follow the
    parameters' names, so the order of groups may change; which kernel runs (`fused`, `foreach`) stays as built.
    """

    _BUILT = frozenset({"params", "fused", "foreach", "capturable", "differentiable", "maximize"})

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        names = {parameter: clean_name(name) for name, parameter in parameters.items()}
        self.groups: list[list[tuple[str, nn.Parameter]]] = []
        for group in optimizer.param_groups:
            if unknown := sum(parameter not in names for parameter in group["params"]):
                raise ValueError(f"{unknown} parameters of the optimizer have no name")
            self.groups.append([(names[parameter], parameter) for parameter in group["params"]])

    def state_dict(self) -> dict[str, Any]:
        state = {
            name: dict(self.optimizer.state[parameter])
            for group in self.groups
            for name, parameter in group
            if self.optimizer.state.get(parameter)
        }
        return {
            "state": state,
            "entries": {name: sorted(k for k, v in e.items() if isinstance(v, Tensor)) for name, e in state.items()},
            "param_groups": [
                {"names": [name for name, _ in named]}
                | {key: _plain(value) for key, value in group.items() if key not in self._BUILT}
                for named, group in zip(self.groups, self.optimizer.param_groups, strict=True)
            ],
        }

    def load_template(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Of every entry that was saved, a tensor to read into, sharded like its parameter, which the optimizer takes as it is:
        there is no second copy. The optimizer is not touched."""
        self._check_kinds(saved)
        self._check_parameters(saved)
        template: dict[str, dict[str, Tensor]] = {}
        for group, named in zip(self.optimizer.param_groups, self.groups, strict=True):
            for name, parameter in named:
                entries = saved["entries"].get(name, [])
                template[name] = {entry: _empty_entry(entry, parameter, group) for entry in entries}
        return {"state": {name: entries for name, entries in template.items() if entries}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = self._check_parameters(state_dict)
        for group, named in zip(self.optimizer.param_groups, self.groups, strict=True):
            for name, parameter in named:
                self.optimizer.state.pop(parameter, None)
                if entry := state_dict["state"].get(name):
                    self.optimizer.state[parameter] = entry
            values = saved[named[0][0]]
            for key, value in values.items():
                group[key] = _like(group.get(key), value)

    def _check_kinds(self, saved: Mapping[str, Any]) -> None:
        """Raise `UserError` for what no optimizer has saved."""
        check_saved({"state": None, "entries": None, "param_groups": None}, saved, "the optimizer")
        for key, kind in (("state", dict), ("entries", dict), ("param_groups", list)):
            if not isinstance(saved[key], kind):
                raise UserError(f"{key} of the optimizer is {shortened(repr(saved[key]))}")
        for name, entries in saved["entries"].items():
            if not isinstance(entries, list) or not all(entry in _ENTRIES for entry in entries):
                raise UserError(f"the optimizer has {shortened(repr(entries))} of {shortened(name)}")
        if bad := [name for name, rest in saved["state"].items() if rest != {} or name not in saved["entries"]]:
            raise UserError(f"the optimizer has {shortened(repr(saved['state'][bad[0]]))} of {shortened(bad[0])}")
        group = self.optimizer.param_groups[0]
        ours = {key: _plain(value) for key, value in group.items() if key not in self._BUILT}
        for number, group in enumerate(saved["param_groups"]):
            names = group.get("names") if isinstance(group, dict) else None
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise UserError(f"group {number} of the optimizer has no names")
            check_saved(ours, {k: v for k, v in group.items() if k != "names"}, f"group {number} of the optimizer")

    def _check_parameters(self, saved: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Saved hyper-parameters by parameter name; `UserError` unless they are those of this optimizer's groups."""
        by_name = {
            name: {key: value for key, value in group.items() if key != "names"}
            for group in saved["param_groups"]
            for name in group["names"]
        }
        ours = {name for named in self.groups for name, _ in named}
        if differing := sorted(ours ^ by_name.keys()):
            raise UserError(
                f"the optimizer trains other parameters than the saved one; {len(differing)} differ: "
                f"{', '.join(differing[:20])}"
            )
        for named in self.groups:
            first = named[0][0]
            for name, _ in named:
                if by_name[name] != by_name[first]:
                    raise UserError(f"{name} and {first} share an optimizer group here, but not in the checkpoint")
        return by_name


_ENTRIES = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"}


def _empty_entry(entry: str, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
    if entry == "step":
        on_device = group.get("fused") or group.get("capturable")
        return torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
    return torch.zeros_like(parameter.detach(), memory_format=torch.preserve_format)


class SchedulerState:
    """A learning rate schedule's position. The curve itself belongs to the configuration and is not saved."""

    def __init__(self, scheduler: LRScheduler) -> None:
        self.scheduler = scheduler

    def state_dict(self) -> dict[str, Any]:
        return {key: _plain(value) for key, value in self.scheduler.state_dict().items() if key != "lr_lambdas"}

    def load_template(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """No tensors to read; raises `UserError` when it is not a schedule's position."""
        check_saved(self.state_dict(), saved, "the schedule")
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        curves = getattr(self.scheduler, "lr_lambdas", None)
        self.scheduler.load_state_dict(state_dict | ({} if curves is None else {"lr_lambdas": [None] * len(curves)}))


class TrainState:
    """How far training has come: `step` steps are done, `nonfinite_skips` updates in them were skipped."""

    def __init__(self, step: int = 0) -> None:
        self.step = step
        self.nonfinite_skips = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "nonfinite_skips": self.nonfinite_skips}

    def load_template(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """No tensors to read; raises `UserError` when it is not a number of steps."""
        # Older checkpoints know no skips.
        check_saved(self.state_dict(), {"nonfinite_skips": 0, **saved}, "train_state")
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict["step"]
        self.nonfinite_skips = state_dict.get("nonfinite_skips", 0)


class Identity:
    """What a frozen role was made from: not saved itself, but a checkpoint is not continued under another one.

    `key` is the role's config key, `identity` a hash of its weights ("": unknown, never refused).
    """

    def __init__(self, key: str, identity: str) -> None:
        self.key = key
        self.identity = identity

    def state_dict(self) -> dict[str, Any]:
        return {"sha256": self.identity}

    def load_template(self, saved_state: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing to read; raises `UserError` when the weights are others."""
        check_saved(self.state_dict(), saved_state, self.key)
        saved = saved_state["sha256"]
        if saved and self.identity and saved != self.identity:
            raise UserError(
                f"{self.key}: the checkpoint was trained with the weights {saved[:12]}..., this run has {self.identity[:12]}..."
                ": use the same ones, or start in another job.dump_folder"
            )
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """There is nothing to load."""


class RandomState:
    """This rank's generators: torch, CUDA, NumPy, Python and the method's `generator`, saved under `rank<r>`.

    `device` is where training runs, by default the generator's device.
    """

    def __init__(self, generator: torch.Generator | None = None, device: torch.device | str | None = None) -> None:
        self.generator = generator
        self.device = torch.device(device or (generator.device if generator else "cpu"))
        self.rank = rank_and_world()[0]

    def state_dict(self) -> dict[str, Any]:
        _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
        version, words, next_gauss = random.getstate()
        state: dict[str, Any] = {
            "torch": torch.get_rng_state(),
            "numpy": {
                "keys": torch.from_numpy(keys.astype(np.int64)),
                "position": int(position),
                "has_gauss": int(has_gauss),
                "gauss": float(gauss),
            },
            "python": {"version": version, "words": torch.tensor(words), "next_gauss": next_gauss},
        }
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        if self.generator is not None:
            state["generator"] = self.generator.get_state()
        return {f"rank{self.rank}": state}

    def load_template(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's part, which may be missing; raises `UserError` when it is not one."""
        state = self.state_dict()
        check_saved(state, state | {key: saved[key] for key in state if key in saved}, "random_state")
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises `UserError`, and changes nothing, when a generator refuses its state."""
        state = state_dict[f"rank{self.rank}"]
        numpy, python = state["numpy"], state["python"]
        keys = numpy["keys"].numpy().astype(np.uint32)
        numpy_state = ("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["gauss"])
        python_state = (python["version"], tuple(python["words"].tolist()), python["next_gauss"])
        try:  # on others first: when one refuses, none has changed
            for name in ("torch", "generator"):
                on_cpu = name == "torch" or (self.generator is not None and self.generator.device.type == "cpu")
                if on_cpu and not torch.equal(torch.Generator().set_state(state[name]).get_state(), state[name]):
                    raise ValueError(f"{name} does not come back as it was")
            if not all(((words >= 0) & (words < 2**32)).all() for words in (numpy["keys"], python["words"])):
                raise ValueError("a word has more than 32 bits")
            np.random.RandomState().set_state(numpy_state)
            random.Random().setstate(python_state)
        except (ValueError, TypeError, OverflowError, RuntimeError) as error:
            raise UserError(f"the state of a random generator is not one: {shortened(error)}") from None
        torch.set_rng_state(state["torch"])
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)
        if self.generator is not None:
            self.generator.set_state(state["generator"])


def clean_name(name: str) -> str:
    """A parameter's name without the parts that wrappers put in."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _like(current: Any, saved: Any) -> Any:
    """`saved`, as it came from JSON, in the type that `current` has."""
    if isinstance(current, Tensor):
        return current.fill_(saved)
    return tuple(saved) if isinstance(current, tuple) and isinstance(saved, Iterable) else saved
