"""transformers.Trainer with the fused head, plain logits where its evaluation wants them.

class FusedTrainer(FusedLossMixin, Trainer): ...
"""

from typing import Any

from var_kernels.integrations.hf import fused_lm_head


class FusedLossMixin:
    """In front of transformers.Trainer or a class of its kind: training and evaluation of the loss make no logits.

    ``predict()``, and ``evaluate()`` with ``compute_metrics``, get the model's own logits, as Trainer's users expect;
    under a bare ``fused_lm_head(model)`` they get none. ``label_smoothing_factor`` and ``compute_loss_func`` take
    logits in Trainer itself: right, and with nothing saved.

    Raises:
        ValueError: the model's head or loss is not understood (see ``fused_lm_head``).
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._fused_head = fused_lm_head(self.model).apply()

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, *args: Any, **kwargs: Any):
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        if loss_only:
            return super().evaluation_loop(dataloader, description, prediction_loss_only, *args, **kwargs)
        self._fused_head.restore()
        try:
            return super().evaluation_loop(dataloader, description, prediction_loss_only, *args, **kwargs)
        finally:
            # A new one: the forward of the old may lie below what accelerate has put around it.
            self._fused_head = fused_lm_head(self.model).apply()
