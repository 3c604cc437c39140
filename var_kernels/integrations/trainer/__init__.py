"""VARTrainer and VARConfig: VAR, SFT or DPO on transformers.Trainer, the loss computed inside the lm_head.

from var_kernels.integrations.trainer import VARConfig, VARTrainer

rows = [{"prompt": "2 + 2 =", "completions": [" 4", " 5"], "rewards": [1.0, 0.0]}, ...]
VARTrainer("my/model", VARConfig(output_dir="runs/var", lam=0.5), train_dataset=rows).train()
"""

from var_kernels.integrations.trainer.config import VARConfig
from var_kernels.integrations.trainer.trainer import VARTrainer

__all__ = ["VARConfig", "VARTrainer"]
