"""VARTrainer and the settings of each method, on transformers.Trainer, the loss computed inside the lm_head.

from var_kernels.integrations.trainer import VARConfig, VARTrainer

rows = [{"prompt": "2 + 2 =", "completions": [" 4", " 5"], "rewards": [1.0, 0.0]}, ...]
VARTrainer("my/model", VARConfig(output_dir="runs/var", lam=0.5), train_dataset=rows).train()
"""

from var_kernels.integrations.trainer.config import AlignConfig, VARConfig, method_config
from var_kernels.integrations.trainer.reward_model import RewardModel
from var_kernels.integrations.trainer.step import NonFiniteLossError
from var_kernels.integrations.trainer.trainer import VARTrainer

__all__ = ["AlignConfig", "NonFiniteLossError", "RewardModel", "VARConfig", "VARTrainer", "method_config"]
