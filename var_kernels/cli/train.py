"""``var-kernels train``: a model and a data set in, an aligned model out."""

import argparse
import contextlib
import errno
import json
import logging
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

from var_kernels.cli import nearest, option_names
from var_kernels.cli.options import coerce, key_values, no_such_model, pair_up, read_yaml

INTERRUPTED = "interrupted; the same command with --resume goes on from the last checkpoint"
# name: (type, default, help). The defaults of _CONFIG are AlignConfig's own, shown here without importing it.
_RUN = {
    "method": (str, "var", "the loss: var, sft, dpo, ipo, sail_pp, ...; `var-kernels methods` lists them"),
    "model": (str, None, "name or path of a causal LM, or of an adapter, which is merged into its base"),
    "from_scratch": (str, None, "instead of --model: a new one, e.g. hidden=128,layers=2,heads=4,vocab=4096"),
    "teacher": (str, None, "name or path of the teacher of --method distill, with the model's tokenizer"),
    "dataset": (str, None, ".json, .jsonl (also .gz) or .parquet file, or a name on the hub (docs/data.md)"),
    "split": (str, None, "split of a hub data set (default train)"),
    "subset": (str, None, "configuration of a hub data set"),
    "eval_dataset": (str, None, "file or name to evaluate on, with --eval-strategy epoch or steps"),
    "eval_split": (str, None, "split of a hub --eval-dataset (default test)"),
    "reward": (str, None, "module:function of (prompts, completions, **columns), for the data's; several: a:f,b:g*0.5"),
    "sampler": (str, None, "module:name of what draws completions, for --online in place of the model's own generate"),
    "reward_model": (str, None, "for --reward: sequence classifier with one label, or what ava_p, bradley_terry saved"),
    "reward_model_chat": (bool, False, "wrap plain text in messages for --reward-model"),
    "columns": (str, None, "names in the data for the columns wanted, e.g. prompt=question,completion=answer"),
    "skip_malformed": (bool, False, "leave out malformed rows (and say how many) in place of stopping"),
    "dtype": (str, "float32", "of the weights: float32, bfloat16, float16 or auto"),
    "lora": (str, None, "train a LoRA adapter, e.g. r=16,alpha=32,dropout=0.05,targets=all-linear (or q_proj+v_proj)"),
    "resume": (bool, False, "continue from the last complete checkpoint in --output-dir"),
    "dry_run": (bool, False, "report tokens, labels, rewards, steps and memory; nothing is trained or written"),
}
_CONFIG = {
    "output_dir": (str, None, "where checkpoints, metrics.jsonl, README.md and the model go"),
    "max_length": (int, 1024, "tokens of prompt and completion; longer rows are cut and counted"),
    "learning_rate": (float, 1e-5, "peak learning rate"),
    "num_train_epochs": (float, 3.0, "passes over the data"),
    "max_steps": (int, -1, "optimiser steps, in place of epochs"),
    "per_device_train_batch_size": (int, 8, "items per micro-batch: completions, prompts (group normalizers) or pairs"),
    "gradient_accumulation_steps": (int, 1, "micro-batches per step; Z spans them all"),
    "workspace_mb": (float, None, "memory for the loss's temporaries"),
    "cache_dir": (str, None, "where reference log-probs are kept"),
    "logging_steps": (float, 10, "steps between two lines of metrics"),
    "save_steps": (float, 500, "steps between two checkpoints"),
    "seed": (int, 42, "of the data order, and of a model from scratch"),
    "report_to": (str, None, "tracker(s) that transformers knows: tensorboard, wandb, ..."),
}
# In errors of torch.save and safetensors.
_WRITING = ("iostream error", "inline_container", "PytorchStreamWriter", "SafetensorError")
_PATHS = ("model", "teacher", "dataset", "eval_dataset", "reward_model")
# Options of the default method; the other methods' are in `var-kernels methods NAME`.
_VAR = {
    "lam": ("FLOAT", "in reward units: small follows the reward, large stays with the reference (default 1.0)"),
    "normalizer": (
        "{self_normalised,group,batch,batch_mean}",
        "what VAR compares rewards within: a prompt's completions (self_normalised, group), or the step's (default "
        "self_normalised)",
    ),
    "reference": ("{none,mean,sum}", "reference term in VAR's weights, per token or summed (default none)"),
}
# As other trainers and newcomers spell them.
_ALIASES = {
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "eval_batch_size": "per_device_eval_batch_size",
    "grad_accum": "gradient_accumulation_steps",
}
_ONLINE = {
    "online": (bool, False, "draw completions from the policy at every iteration; the data give prompts"),
    "iterations": (int, 10, "rounds of drawing and training, in place of epochs"),
    "prompts_per_iteration": (int, 64, "taken from the data in turn"),
    "generations_per_prompt": (int, None, "K completions of each (by default 2 for sail_pp and sail_pr, 8 for others)"),
    "steps_per_iteration": (int, None, "optimiser steps (by default one pass over what was drawn)"),
    "max_new_tokens": (int, 128, "longest completion"),
    "sampling_temperature": (float, None, "of the draws (by default 0.9 for sail_pp and sail_pr, 1.0 for others)"),
    "logp_temperature": (float, None, "of the log-probs that the loss reads (policy gradients: by default the draws')"),
    "importance_cap": (float, None, "of tokens' importance weights min(exp(lp_old - lp_sampler), cap), with --sampler"),
    "refresh_reference": (bool, None, "the reference is the policy at the iteration's start (default: not sail, grpo)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", help="YAML file of these options; flags override it")
    for group, options in (("what to train", _RUN), ("how", _CONFIG), ("online", _ONLINE)):
        section = parser.add_argument_group(group)
        for name, (kind, default, text) in options.items():
            flag = "--" + name.replace("_", "-")
            shown = text if default in (None, False) else f"{text} (default {default})"
            if kind is bool and options is _ONLINE:
                section.add_argument(flag, nargs="?", const=True, default=None, metavar="BOOL", help=shown)
            elif kind is bool:
                section.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=shown)
            else:
                section.add_argument(flag, type=kind, default=None, metavar=kind.__name__.upper(), help=shown)
    section = parser.add_argument_group("VAR (other methods' options: `var-kernels methods NAME`)")
    for name, (metavar, text) in _VAR.items():  # as text: the method's settings check it, and that it is theirs
        section.add_argument(f"--{name}", nargs="?", const=True, default=None, metavar=metavar, help=text)
    parser.epilog = (
        "Other methods' options (--beta, ...) and every other field of transformers.TrainingArguments (--bf16, ...) "
        "are options too; --lr, --batch-size and --epochs stand for --learning-rate, --per-device-train-batch-size and "
        "--num-train-epochs."
    )
    parser.set_defaults(extra={}, parser=parser)


def take_unknown(args: argparse.Namespace, words: list[str]) -> None:
    args.extra = pair_up(words)


def run(args: argparse.Namespace) -> int:
    with _logged_to_stderr():
        return _run(args)


@contextlib.contextmanager
def _logged_to_stderr():
    """Print the library's log, each line after its logger's name: all of the first process, the warnings of others."""
    handler, log = logging.StreamHandler(), logging.getLogger("var_kernels")
    handler.setFormatter(logging.Formatter("[var-kernels] %(message)s"))
    level, propagate, show = log.level, log.propagate, warnings.showwarning

    def shown(message, category, *place, **options):
        if category.__module__.startswith("var_kernels"):
            log.warning("%s", message)
        else:
            show(message, category, *place, **options)

    warnings.showwarning = shown
    log.setLevel(logging.INFO if _is_first_rank() else logging.WARNING)
    log.addHandler(handler)
    log.propagate = bool(logging.getLogger().handlers) and propagate
    try:
        yield
    finally:
        warnings.showwarning = show
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


def _is_first_rank() -> bool:
    """By the launcher's own variable: torch.distributed knows it later."""
    return os.environ.get("RANK", "0") == "0"


def _run(args: argparse.Namespace) -> int:
    settings, config_values = _settings(args)
    for name in ("dataset",) if settings["dry_run"] else ("dataset", "output_dir"):
        if not (settings | config_values).get(name):
            raise ValueError(f"--{name.replace('_', '-')} must be given, got none: {(_RUN | _CONFIG)[name][2]}")
    _check_model_options(settings)

    from transformers import set_seed
    from transformers.utils.logging import disable_progress_bar

    from var_kernels.integrations.data import is_local, load_examples
    from var_kernels.integrations.trainer import VARTrainer, method_config
    from var_kernels.integrations.trainer.loading import load_causal_lm
    from var_kernels.integrations.trainer.methods import METHODS
    from var_kernels.integrations.trainer.rewards import load_function

    if not sys.stderr.isatty():  # a log file: no progress bars, unless asked for
        config_values.setdefault("disable_tqdm", True)
    if config_values.get("disable_tqdm"):
        disable_progress_bar()
    config = method_config(settings["method"])(**config_values)
    output_dir = Path(config.output_dir)
    if config.resume_from_checkpoint:  # a field that Trainer leaves to scripts
        raise ValueError(
            f"resume-from-checkpoint must be left out, got {config.resume_from_checkpoint}; --resume goes on from the "
            "newest whole checkpoint in --output-dir"
        )
    _check_evaluation(settings, config)
    _check_optimisation(config)
    checkpoint = None
    if not settings["dry_run"]:
        _check_writable(output_dir)
        checkpoint = _checkpoint(output_dir, settings["resume"])
    if bool(settings["teacher"]) != (METHODS[config.method].teacher == "given"):
        got = f"--teacher {settings['teacher']}" if settings["teacher"] else "no --teacher"
        raise ValueError(
            f"teacher: --method distill needs one and no other method reads it, got {got} with {config.method}"
        )
    reward_func = _reward_function(settings, config)
    peft_config = _lora(settings["lora"]) if settings["lora"] else None
    need = "prompt" if config.online else "optional" if reward_func else METHODS[config.method].need_rewards
    load = {"need_rewards": need, "skip_malformed": settings["skip_malformed"]}
    load["columns"] = _columns(settings["columns"])
    examples, skipped = load_examples(settings["dataset"], split=settings["split"], subset=settings["subset"], **load)
    _report_skipped(skipped, len(examples))
    malformed, eval_examples = len(skipped), None
    if name := settings["eval_dataset"]:
        where = {} if is_local(name) else {"split": "test", "subset": settings["subset"]}
        if settings["eval_split"]:
            where["split"] = settings["eval_split"]
        eval_examples, skipped = load_examples(name, **where, **load)
        _report_skipped(skipped, len(eval_examples))

    set_seed(config.seed)
    model, tokenizer = _model_and_tokenizer(settings, config, examples, checkpoint)
    set_seed(config.seed)
    options = {"reward_func": reward_func, "peft_config": peft_config}
    sampler = load_function(settings["sampler"], "sampler") if settings["sampler"] else None
    if settings["dry_run"]:
        from var_kernels.integrations.trainer.preview import preview

        report = preview(model, config, examples, tokenizer, malformed=malformed, sampler=sampler, **options)
        if config.process_index == 0:
            print(report)
        return 0
    if settings["teacher"]:
        with _loading("teacher", settings["teacher"]):
            options["ref_model"] = load_causal_lm(settings["teacher"])
    try:
        trainer = VARTrainer(model, config, examples, eval_examples, tokenizer, sampler=sampler, **options)
    except RuntimeError as error:
        if "to be installed" not in str(error):
            raise
        # a tracker's callback of transformers
        raise ImportError(f"report-to: {error} Or pass --report-to none") from error
    except Exception as error:  # the hub's client lets its transport's own errors through
        if not (config.push_to_hub and type(error).__module__.startswith(("httpx", "huggingface_hub", "requests"))):
            raise
        raise OSError(
            f"push-to-hub: no repository could be made on the hub ({error}); check the network and `hf auth login`, or "
            "drop --push-to-hub"
        ) from error
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.create_model_card()
    except BrokenPipeError as error:  # `| head`
        raise BrokenPipeError(
            "standard output must stay open while training runs, got a pipe whose reader has ended; the same command "
            "with --resume goes on from the last checkpoint"
        ) from error
    except Exception as error:
        if (reason := _unwritable(output_dir, error)) is None:
            raise
        raise OSError(f"output-dir: {reason}, and --resume goes on from the last whole checkpoint") from error
    if trainer.is_world_process_zero():
        print(f"saved to {output_dir}: the model, README.md, metrics.jsonl")
    trainer.accelerator.wait_for_everyone()  # a rank that ends while another still writes makes that one hang
    trainer.accelerator.end_training()
    return 0


def _unwritable(output_dir: Path, error: Exception) -> str | None:
    """Say why the folder of a run could not be written to any more, and what to do; None where something else failed:
    a full disk is an OSError, a RuntimeError of torch's or one of safetensors' own."""
    if not output_dir.is_dir():
        return f"{output_dir} was removed while training ran; put it back"
    if shutil.disk_usage(output_dir).free < 2**20:
        return f"no space left on the disk of {output_dir}; make room"
    unwritable = isinstance(error, OSError) and error.errno in (errno.EDQUOT, errno.EFBIG, errno.EROFS)
    if unwritable or any(text in f"{type(error).__name__} {error}" for text in _WRITING):
        reason = str(error).strip().partition("\n")[0]
        return f"a file in {output_dir} could not be written whole; see the quota and the folder ({reason:.200})"
    return None


def _check_model_options(settings: dict) -> None:
    if bool(settings["model"]) == bool(settings["from_scratch"]):
        given = "both" if settings["model"] else "neither"
        raise ValueError(f"give one of --model and --from-scratch, got {given}")
    if settings["dtype"] not in ("float32", "bfloat16", "float16", "auto"):
        raise ValueError(f"dtype must be float32, bfloat16, float16 or auto, got {settings['dtype']!r}")
    if settings["from_scratch"] and settings["dtype"] != "float32":
        raise ValueError(f"dtype: a model from scratch is in float32, got {settings['dtype']!r}; drop --dtype")


def _check_evaluation(settings: dict, config) -> None:
    evaluates = config.eval_strategy != "no" or config.eval_on_start
    if settings["eval_dataset"] and not evaluates:
        raise ValueError(
            "eval-dataset must be given with an evaluation strategy, got --eval-strategy no; pass --eval-strategy "
            "epoch (or steps, with --eval-steps)"
        )
    if evaluates and not settings["eval_dataset"]:
        raise ValueError(f"eval-strategy: {config.eval_strategy.value} needs --eval-dataset, got none")
    if settings["eval_split"] and not settings["eval_dataset"]:
        raise ValueError("eval-split needs --eval-dataset, got none; name the data set, or drop --eval-split")


def _check_optimisation(config) -> None:
    """Options that transformers would first look at when training begins, with a traceback."""
    from torch import nn, optim
    from transformers import get_scheduler

    if config.optim_args and not all("=" in pair for pair in config.optim_args.split(",")):
        raise ValueError(f"optim-args must be key=value,key=value, got {config.optim_args!r}")
    given = config.lr_scheduler_kwargs
    optimizer = optim.SGD([nn.Parameter()], lr=config.learning_rate)
    try:
        get_scheduler(config.lr_scheduler_type, optimizer, 0, 1, scheduler_specific_kwargs=given)
    except TypeError as error:
        kind = config.lr_scheduler_type.value
        raise ValueError(
            f'lr-scheduler-kwargs must be JSON of the options of {kind!r}, such as {{"num_cycles": 2}}, '
            f"got {given!r}: {error}"
        ) from error


def _check_writable(output_dir: Path) -> None:
    """Refuse a folder that cannot be written to, or whose nearest parent cannot: before the work and not after it."""
    folder = output_dir
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"output-dir must be a folder, got the file {folder}; choose another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"output-dir must be writable, got {folder} without the permission; choose another")


def _reward_function(settings: dict, config):
    from var_kernels.integrations.trainer.reward_model import RewardModel
    from var_kernels.integrations.trainer.rewards import load_rewards

    if settings["reward"] and settings["reward_model"]:
        raise ValueError("give one of --reward and --reward-model, got both; drop one")
    if settings["reward_model_chat"] and not settings["reward_model"]:
        raise ValueError("--reward-model-chat needs --reward-model, got none; name the model, or drop it")
    if settings["reward"]:
        return load_rewards(settings["reward"])
    if settings["reward_model"]:
        with _loading("reward-model", settings["reward_model"], "sequence classifier, or a model with a reward head,"):
            return RewardModel.from_pretrained(
                settings["reward_model"],
                device=config.device,
                batch_size=config.per_device_eval_batch_size,
                max_length=config.max_length,
                as_chat=settings["reward_model_chat"],
            )
    return None


def _columns(text: str | None) -> dict[str, str]:
    """ "prompt=question,completion=answer": the columns wanted, and their names in the data."""
    pairs = [part.partition("=") for part in filter(None, (text or "").split(","))]
    columns = {wanted.strip(): name.strip() for wanted, _, name in pairs}
    if not all(equals and wanted and name for wanted, equals, name in pairs) or len(columns) < len(pairs):
        raise ValueError(f"columns must be WANTED=NAME,WANTED=NAME, got {text!r}")
    return columns


def _report_skipped(skipped: list, kept: int) -> None:
    if skipped and _is_first_rank():
        for problem in skipped[:10]:
            print(f"skipped {problem}", file=sys.stderr)
        print(f"skipped {len(skipped)} malformed rows of {kept + len(skipped)}", file=sys.stderr)


def _settings(args: argparse.Namespace) -> tuple[dict, dict]:
    """(options of the run, options of the method's configuration): YAML first, flags over it, all checked."""
    known = (*_RUN, *_CONFIG, *_ONLINE, *_VAR)
    given = {name: value for name, value in vars(args).items() if name in known and value is not None}
    flags = given | _without_aliases(args.extra)
    options = _without_aliases(read_yaml(args.config)) if args.config else {}
    if flags.get("model") or flags.get("from_scratch"):  # two answers to one question
        options = {name: value for name, value in options.items() if name not in ("model", "from_scratch")}
    options = _of_variant(options | flags)
    run_options: dict[str, Any] = {name: default for name, (_, default, _) in _RUN.items()}
    config_options, rest = {}, {}
    for name, value in options.items():
        if name in _RUN:
            run_options[name] = coerce(name, value, f"{_RUN[name][0].__name__} | None")
        elif name in _CONFIG or name in _ONLINE:
            config_options[name] = coerce(name, value, f"{(_CONFIG | _ONLINE)[name][0].__name__} | None")
        else:
            rest[name] = value
    for name in _PATHS:  # the shell does it for --model ~/model, none for YAML and --model=~/model
        if run_options[name]:
            run_options[name] = os.path.expanduser(run_options[name])
    if rest:
        config_options |= _config_fields(rest, run_options["method"], option_names(args.parser))
    return run_options, config_options


def _without_aliases(options: dict) -> dict:
    return {_ALIASES.get(name, name): value for name, value in options.items()}


def _of_variant(options: dict) -> dict:
    """A variant's name stands for a method and settings, which others given beside it override."""
    from var_kernels.integrations.trainer.methods import METHODS
    from var_kernels.losses import VARIANTS

    method = options.get("method", "var")
    if method not in METHODS and method not in VARIANTS:
        near = nearest(str(method), [*METHODS, *VARIANTS])
        raise ValueError(f"method must be one that `var-kernels methods` lists, got {method!r}{near}")
    variant = VARIANTS.get(method)
    if variant is None:
        return options
    if variant.function is not None:
        raise ValueError(f"method must be a training method, got {variant.name}, a function; call {variant.use}")
    return {**variant.settings, **options, "method": variant.loss}


def _config_fields(options: dict, method: str, known: list[str]) -> dict:
    """Options that only the method's configuration knows."""
    import dataclasses

    from var_kernels.integrations.trainer import method_config
    from var_kernels.integrations.trainer.methods import METHODS

    declared = {field.name: field for field in dataclasses.fields(method_config(method)) if field.init}
    types = {name: field.type for name, field in declared.items()}
    fields = {name: kind.__name__ if isinstance(kind, type) else str(kind) for name, kind in types.items()}
    for name in options:
        if name in fields:
            continue
        flag = "--" + name.replace("_", "-")
        if others := [other for other in METHODS if name in METHODS[other].own_settings]:
            raise ValueError(f"{flag} is no option of method {method!r}; it belongs to {', '.join(others)}")
        everything = [*known, *("--" + field.replace("_", "-") for field in fields)]
        near = nearest(flag, everything) or "; --help and `var-kernels methods NAME` list the options"
        raise ValueError(f"unknown option {flag}{near}")
    values = {name: coerce(name, value, fields[name]) for name, value in options.items()}
    for name, value in values.items():
        choices = declared[name].metadata.get("choices")  # what argparse would refuse
        if choices and value is not None and value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return values


def _checkpoint(output_dir: Path, resume: bool) -> str | None:
    """The checkpoint to continue from. A directory that holds a run is not written over."""
    if resume:
        checkpoint = last_complete_checkpoint(output_dir)
        none = f"no complete checkpoint in {output_dir}: starting anew"
        if _is_first_rank():
            print(f"resuming from {checkpoint}" if checkpoint else none)
        return checkpoint
    marks = ("checkpoint-*", "metrics.jsonl", "*.safetensors", "buffer")
    if output_dir.is_dir() and any(next(output_dir.glob(mark), None) for mark in marks):
        raise ValueError(
            f"output-dir: {output_dir} already holds a run: --resume continues it, another --output-dir keeps both"
        )
    return None


def last_complete_checkpoint(output_dir: Path) -> str | None:
    """The newest checkpoint-N whose trainer_state.json is whole: Trainer writes that file last."""
    found = []
    for folder in output_dir.glob("checkpoint-*"):
        number = folder.name.removeprefix("checkpoint-")
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if number.isdigit():
            found.append((int(number), str(folder)))
    return max(found)[1] if found else None


def _model_and_tokenizer(settings: dict, config, examples: list, checkpoint: str | None):
    from transformers import AutoTokenizer

    from var_kernels.integrations.trainer.loading import load_causal_lm

    if settings["from_scratch"]:
        from var_kernels.integrations.from_scratch import ScratchSpec, make_model, train_tokenizer

        spec = ScratchSpec(**key_values("from-scratch", settings["from_scratch"], vars(ScratchSpec())))
        if not all(isinstance(example.prompt, str) for example in examples):
            raise ValueError(
                "from-scratch: the data must be plain text, since a new tokenizer has no chat template, got messages; "
                "pass --model in place of --from-scratch"
            )
        texts = (text for example in examples for text in (example.prompt, *example.completions))
        tokenizer = AutoTokenizer.from_pretrained(checkpoint) if checkpoint else train_tokenizer(texts, spec.vocab)
        return make_model(spec, len(tokenizer), config.max_length, config.seed), tokenizer
    name = settings["model"]
    with _loading("model", name):
        return load_causal_lm(name, settings["dtype"]), AutoTokenizer.from_pretrained(name)


@contextlib.contextmanager
def _loading(option: str, name: str, kind: str = "causal LM"):
    """Name the option in whatever transformers raises where no model is, or its files are of another kind or cut
    short."""
    from var_kernels.integrations.trainer.loading import check_folder

    check_folder(option.replace("-", " "), name)
    try:
        yield
    except ImportError:
        raise
    except OSError as error:
        raise no_such_model(option, name, error) from error
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        if isinstance(error, ValueError) and reason.startswith(("model: ", "reward model")):  # ours
            raise
        raise ValueError(
            f"{option} must be a {kind} that transformers can load, got {name}; check its config.json and weights: "
            f"{reason:.300}"
        ) from error


def _lora(text: str):
    """A peft LoraConfig; targets "all-linear" leaves the lm_head out."""
    from peft import LoraConfig

    values = key_values("lora", text, {"r": 8, "alpha": 16, "dropout": 0.0, "targets": "all-linear"})
    if values["r"] < 1:
        raise ValueError(f"lora: r must be at least 1, got {values['r']}")
    targets = values["targets"] if values["targets"] == "all-linear" else values["targets"].split("+")
    return LoraConfig(
        r=values["r"],
        lora_alpha=values["alpha"],
        lora_dropout=values["dropout"],
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
