"""The registry of methods: the name in `[method] name` -> the class."""

from fvtitan.methods.base import TrainingMethod
from fvtitan.methods.dfsft import DiffusionForcingSFTMethod
from fvtitan.methods.finetune import FineTuneMethod

METHODS: dict[str, type[TrainingMethod]] = {
    "finetune": FineTuneMethod,
    "dfsft": DiffusionForcingSFTMethod,
}
