"""The registry of methods: the name in `[method] name` -> the class."""

from fvtitan.methods.base import TrainingMethod
from fvtitan.methods.dfsft import DiffusionForcingSFTMethod
from fvtitan.methods.dmd2 import DMD2Method
from fvtitan.methods.finetune import FineTuneMethod
from fvtitan.methods.kd import KDCausalMethod, KDMethod
from fvtitan.methods.self_forcing import SelfForcingMethod

METHODS: dict[str, type[TrainingMethod]] = {
    "finetune": FineTuneMethod,
    "dfsft": DiffusionForcingSFTMethod,
    "kd": KDMethod,
    "kd_causal": KDCausalMethod,
    "dmd2": DMD2Method,
    "self_forcing": SelfForcingMethod,
}
