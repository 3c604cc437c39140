"""Every loss that the papers and their baselines name is a row of the registry, a variant of one, or a function."""

import inspect

import pytest

from var_kernels.losses import LOSSES, VARIANTS

# what the papers call it: (where it stands, the setting that makes it, if a default does not)
ROWS = {
    "VAR": ("var", "normalizer=self_normalised"),
    "VAR, Z over the batch": ("var_batch", ""),
    "VAR, Z as a mean over the batch": ("var_batch_mean", ""),
    "VAR, cross scores": ("var_cross", ""),
    "VAR, Z over the prompt's completions": ("var_group", ""),
    "VAR, self-normalised": ("var_self_normalised", ""),
    "VAR, online": ("online_var", ""),
    "AVA-d": ("ava_d", ""),
    "AVA-p": ("ava_p", ""),
    "AVA-p, regularised over one response": ("ava_p", "regularise=both"),
    "AVA, Q read literally": ("ava_literal", ""),
    "AVA-d, sums as printed": ("ava_d_printed", ""),
    "SAIL-DP": ("sail_dp", "squared_coef=1.0"),
    "SAIL-PP": ("sail_pp", "score_coef=1.0"),
    "SAIL-PR": ("sail_pr", "score_coef=1.0"),
    "SAIL-DP as released": ("sail_dp_released", ""),
    "SAIL-PP as released": ("sail_pp_released", ""),
    "SAIL-PR as released": ("sail_pr_released", ""),
    "SAIL-RevKL": ("sail_revkl", ""),
    "SAIL-PP online": ("online_sail_pp", ""),
    "SAIL-PR online": ("online_sail_pr", ""),
    "SFT": ("sft", ""),
    "DPO": ("dpo", "label_smoothing=0.0"),
    "cDPO": ("cdpo", ""),
    "robust DPO": ("robust_dpo", ""),
    "IPO, means": ("ipo", "token_reduction=mean"),
    "IPO, sums": ("ipo_sum", ""),
    "SLiC-HF": ("slic", ""),
    "hinge with a reference": ("hinge", ""),
    "A-LoL": ("alol", "clip_range=0.9"),
    "A-LoL seq": ("alol_seq", ""),
    "A-LoL ref-free": ("alol_ref_free", ""),
    "A-LoL KL": ("alol_kl", ""),
    "R-LoL": ("rlol", ""),
    "R-GOLD": ("rgold", "min_prob=0.1"),
    "weighted BC": ("weighted_bc", ""),
    "DRO-V": ("dro", "standardise_rewards=True"),
    "online iterative DPO": ("iterative_dpo", ""),
    "AWR": ("awr", "max_weight=20.0"),
    "RAFT": ("raft", ""),
    "best-of-n SFT": ("best_of_n", ""),
    "REBEL": ("rebel", ""),
    "QRPO": ("qrpo", ""),
    "KTO": ("kto", ""),
    "A*-PO": ("astar_po", "value_temperature=None"),
    "OAPL": ("oapl", ""),
    "GVPO": ("gvpo", ""),
    "InfoNCA": ("info_nca", ""),
    "NCA": ("nca", ""),
    "target policy optimisation": ("target_po", "eta=1.0"),
    "SimPO": ("simpo", ""),
    "ORPO": ("orpo", ""),
    "EXO": ("exo", ""),
    "LIRE": ("lire", ""),
    "DFT": ("dft", ""),
    "importance-weighted SFT": ("iw_sft", "max_weight=16.0"),
    "importance-weighted SFT, a weight a token": ("iw_sft_token", "ratio_max=1.8"),
    "proximal SFT": ("psft", ""),
    "ASFT": ("asft", "kl_coef=0.1"),
    "EAFT": ("eaft", "max_entropy=3.0"),
    "CHORD's phi": ("chord_phi", ""),
    "PPO token clip": ("ppo", "clip_low=0.2"),
    "GRPO": ("grpo", ""),
    "DAPO": ("dapo", ""),
    "Dr. GRPO": ("dr_grpo", ""),
    "dual-clip PPO": ("dual_clip", ""),
    "CISPO": ("cispo", "ratio_min=0.0"),
    "CISPO, clipped on both sides": ("cispo_clipped", ""),
    "SAPO": ("sapo", "temperature_neg=1.05"),
    "GSPO": ("gspo", "clip_low=0.0003"),
    "signed REINFORCE": ("reinforce", "advantages=leave_one_out"),
    "RLOO": ("rloo", ""),
    "REINFORCE++": ("reinforce_plus_plus", ""),
    "REINFORCE++-baseline": ("reinforce_plus_plus_baseline", ""),
    "weighted SFT": ("weighted_sft", ""),
    "VESPO": ("vespo", "k_pos=2.0"),
    "TOPR": ("topr", "advantages=given"),
    "token-wise KL to a reference": ("token_kl", ""),
    "Bradley-Terry reward model": ("bradley_terry", ""),
}


@pytest.mark.parametrize("row", ROWS)
def test_row_is_in_the_table(row):
    pytest.importorskip("transformers")
    from var_kernels.cli.methods import markdown_table, variants_table
    from var_kernels.integrations.trainer.methods import METHODS

    name, setting = ROWS[row]
    assert sum(f"\n| `{name}` |" in table for table in (markdown_table(), variants_table())) == 1
    if setting:
        option, value = setting.split("=")
        assert str(METHODS[name].own_settings[option][1]) == value


def test_the_table_has_no_other_rows():
    assert {name for name, _ in ROWS.values()} == {*LOSSES, *VARIANTS, "bradley_terry", "asft"}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_what_it_says(name, tmp_path):
    """Its settings are those of its method, differ from the defaults, and make a configuration; a function is public
    and documented."""
    variant = VARIANTS[name]
    if variant.function is not None:
        assert "Returns" in inspect.getdoc(variant.function)
        assert not variant.settings
        return
    pytest.importorskip("transformers")
    from var_kernels.integrations.trainer import method_config

    settings = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    plain = method_config(variant.loss)(**settings)
    config = method_config(variant.loss)(**settings, **variant.settings)
    given = {key: getattr(config, key) for key in variant.settings}
    assert given == dict(variant.settings)
    if name not in ("best_of_n", "var_self_normalised", "rloo"):  # a method's default, by its other name
        assert given != {key: getattr(plain, key) for key in variant.settings}


def test_variants_are_methods_of_the_command(tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    from var_kernels.cli import main
    from var_kernels.integrations import trainer

    seen = []

    class StoppedError(Exception):
        pass

    def stop(*args, **kwargs):
        seen.append(args[1])
        raise StoppedError

    monkeypatch.setattr(trainer, "VARTrainer", stop)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "completions": ["a", "b"], "rewards": [1, 0]}\n')
    base = f"--dataset {tmp_path}/rows.jsonl --output-dir {tmp_path}/run --from-scratch vocab=270 --max-length 32"
    base = base.split()
    sail = {"method": "sail_pp", "online": True, "generations_per_prompt": 2}
    for method, more, expected in (
        ("cdpo", [], {"method": "dpo", "label_smoothing": 0.1}),
        ("cdpo", ["--label-smoothing", "0.3"], {"method": "dpo", "label_smoothing": 0.3}),
        ("dr_grpo", [], {"method": "ppo", "advantages": "group_mean", "length_normalization": "constant"}),
        ("online_sail_pp", ["--max-new-tokens", "4"], sail),
    ):
        with pytest.raises(StoppedError):
            main(["train", "--method", method, *base, *more])
        assert {key: getattr(seen[-1], key) for key in expected} == expected
    # as it is printed: the same settings by flags
    with pytest.raises(StoppedError):
        main(["train", *VARIANTS["dr_grpo"].use.split(), *base])
    assert seen[-1].advantages == "group_mean"
    assert main(["train", "--method", "token_kl", *base]) == 2
    assert "token_kl is no method of training; call linear_token_kl(...)" in capsys.readouterr().err


def test_the_command_says_what_a_variant_is(capsys):
    pytest.importorskip("transformers")
    from var_kernels.cli import main

    assert main(["methods", "iterative_dpo"]) == 0
    out = capsys.readouterr().out
    assert "--method dpo --online --generations-per-prompt 8 --refresh-reference" in out
    assert "Direct preference optimisation" in out
