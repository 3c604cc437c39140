"""transformers.Trainer with the fused head, plain logits where its evaluation wants them.

class FusedTrainer(FusedLossMixin, Trainer): ...
"""

from typing import TYPE_CHECKING, Any

from var_kernels.integrations.hf import fused_lm_head
from var_kernels.integrations.hf.forwards import swapped

if TYPE_CHECKING:
    from transformers import Trainer as TrainerBase
else:
    TrainerBase = object


class FusedLossMixin(TrainerBase):
    """Mixin in front of transformers.Trainer or a class of its kind: training and evaluating the loss make no logits.

    ``predict()``, and ``evaluate()`` with ``compute_metrics``, get the model's own logits, as Trainer's users expect;
    under a bare ``fused_lm_head(model)`` they get none. ``label_smoothing_factor`` and ``compute_loss_func`` take
    logits in Trainer itself: right, and with nothing saved.

    Raises:
        ValueError: the model's head or loss is not understood (see ``fused_lm_head``).
        TypeError: the mixin stands behind the trainer.
    """

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        refuse_behind_trainer(cls, FusedLossMixin)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fused_head = fused_lm_head(self.model).apply()

    def call_model_init(self, trial: Any = None) -> Any:
        """See ``transformers.Trainer``, whose train() calls it again: each model that ``model_init`` makes is fused."""
        model = super().call_model_init(trial)
        if hasattr(self, "_fused_head"):  # the constructor sees to the first one
            self._fused_head = fused_lm_head(model).apply()
        return model

    def evaluation_loop(
        self, dataloader: Any, description: str, prediction_loss_only: bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        if loss_only:
            # As plain Trainer: a batch without labels is NaN, which its mean over the batches leaves out.
            with swapped(self._fused_head, "loss_without_labels", float("nan")):
                return super().evaluation_loop(dataloader, description, prediction_loss_only, *args, **kwargs)
        self._fused_head.restore()
        try:
            return super().evaluation_loop(dataloader, description, prediction_loss_only, *args, **kwargs)
        finally:
            # A new one: the forward of the old may lie below what accelerate has put around it.
            self._fused_head = fused_lm_head(self.model).apply()


def refuse_behind_trainer(cls: type, mixin: type) -> None:
    """``class T(Trainer, Mixin)``: Trainer's constructor would never call the mixin's, and all would stay plain."""
    for base in cls.__mro__[1 : cls.__mro__.index(mixin)]:
        whole = all(hasattr(base, name) for name in ("train", "evaluate", "get_train_dataloader"))
        if whole and mixin not in base.__mro__:
            raise TypeError(
                f"{cls.__name__}: {mixin.__name__} stands behind {base.__name__}, where it does nothing; write "
                f"class {cls.__name__}({mixin.__name__}, {base.__name__})"
            )
