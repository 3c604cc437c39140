"""Online training: completions drawn from the current policy at the start of every iteration, scored, kept on disk,
trained on.

    from var_kernels.integrations.trainer import VARTrainer, method_config

    config = method_config("dpo")("runs/dpo", online=True, iterations=20, prompts_per_iteration=64)
    VARTrainer("my/model", config, train_dataset=[{"prompt": "2 + 2 ="}, ...], reward_func=my_reward).train()

An iteration is an epoch of transformers.Trainer: one run underneath, whose optimizer and schedule go on.
"""

from var_kernels.integrations.trainer.online.buffer import Buffer
from var_kernels.integrations.trainer.online.loop import OnlineLoop
from var_kernels.integrations.trainer.online.sampler import GenerateSampler, Sampler, Samples

__all__ = ["Buffer", "GenerateSampler", "OnlineLoop", "Sampler", "Samples"]
