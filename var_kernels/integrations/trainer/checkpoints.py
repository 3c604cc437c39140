"""What VARTrainer saves and loads beside the policy: the head next to the lm_head, a reference that moves, the card."""

import contextlib
from pathlib import Path

from transformers import AutoModelForCausalLM

from var_kernels.integrations.hf.heads import load_head
from var_kernels.integrations.trainer.model_card import write_model_card
from var_kernels.integrations.trainer.sharding import whole_when_saved

_REF_MODEL_DIR = "ref_model"


class Checkpoints:
    """Mixin in front of transformers.Trainer."""

    def _save_checkpoint(self, model, trial):
        # before the rest: a checkpoint is complete once Trainer has written its state
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.sync_ref_model and self.args.should_save:
            self.ref_model.save_pretrained(folder / _REF_MODEL_DIR)
        if self.is_fsdp_enabled and self.args.should_save:  # with weights in parts Trainer leaves the tokenizer out
            self.processing_class.save_pretrained(folder)
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See ``transformers.Trainer.save_model``; under FSDP it saves the whole model, also where checkpoints are in
        parts."""
        whole = self.is_fsdp_enabled and not _internal_call
        with whole_when_saved(self) if whole else contextlib.nullcontext():
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.extra_head is not None:
            self.extra_head.save_pretrained(output_dir or self.args.output_dir, is_main_process=self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        # under FSDP it is among the model's own weights
        if self.method.head in ("value", "reward") and not self.is_fsdp_enabled:
            self.extra_head.load_state_dict(load_head(resume_from_checkpoint).state_dict())
        if self.args.sync_ref_model:
            moved = AutoModelForCausalLM.from_pretrained(Path(resume_from_checkpoint) / _REF_MODEL_DIR)
            self.ref_model.load_state_dict(moved.state_dict())

    def _issue_warnings_after_load(self, load_result) -> None:
        """Without the second names of tied weights among the missing: a checkpoint holds them once."""
        tensors = self.model.state_dict(keep_vars=True)
        found = {id(tensor) for name, tensor in tensors.items() if name not in load_result.missing_keys}
        missing = [name for name in load_result.missing_keys if id(tensors.get(name)) not in found]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def create_model_card(self, *args, **kwargs) -> None:
        """README.md in output_dir: what was trained on what, the settings, the last metrics."""
        if self.is_world_process_zero():
            write_model_card(self)
