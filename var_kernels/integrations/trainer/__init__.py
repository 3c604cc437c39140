"""VARTrainer and the settings of each method, on transformers.Trainer, the loss computed inside the lm_head.

Without the command line:

    from var_kernels.integrations.trainer import VARConfig, VARTrainer

    rows = [{"prompt": "2 + 2 =", "completions": [" 4", " 5"], "rewards": [1.0, 0.0]}, ...]
    VARTrainer("my/model", VARConfig(output_dir="runs/var", lam=0.5), train_dataset=rows).train()
"""

from importlib import import_module
from typing import TYPE_CHECKING

from var_kernels.integrations import missing_package

if TYPE_CHECKING:
    from var_kernels.integrations.trainer.config import AlignConfig, VARConfig, method_config
    from var_kernels.integrations.trainer.reward_model import RewardModel
    from var_kernels.integrations.trainer.rewards import RewardSum
    from var_kernels.integrations.trainer.step import NonFiniteLossError
    from var_kernels.integrations.trainer.trainer import VARTrainer

# The table of methods is also read where transformers is not installed.
_HOME = {
    "AlignConfig": "config",
    "NonFiniteLossError": "step",
    "RewardModel": "reward_model",
    "RewardSum": "rewards",
    "VARConfig": "config",
    "VARTrainer": "trainer",
    "method_config": "config",
}
__all__ = ["AlignConfig", "NonFiniteLossError", "RewardModel", "RewardSum", "VARConfig", "VARTrainer", "method_config"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    try:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    except ImportError as error:
        raise missing_package(error) or error from error


def __dir__():
    return sorted({*globals(), *__all__})
