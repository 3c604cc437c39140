"""The variants: methods by other names, with the settings that make them, or functions."""

import inspect

import pytest

from var_kernels.losses import VARIANTS


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
    assert "a training method, got token_kl, a function; call linear_token_kl(...)" in capsys.readouterr().err


def test_the_command_says_what_a_variant_is(capsys):
    pytest.importorskip("transformers")
    from var_kernels.cli import main

    assert main(["methods", "iterative_dpo"]) == 0
    out = capsys.readouterr().out
    assert "--method dpo --online --generations-per-prompt 8 --refresh-reference" in out
    assert "Direct preference optimisation" in out
