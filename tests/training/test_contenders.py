"""Which rows a comparison has, and with which settings."""

import pytest

from equipoise import METHODS
from equipoise.config import CompareConfig, ModelConfig, OptimizerConfig, TrainConfig
from equipoise.errors import UserError
from equipoise.training.contenders import Contender, contenders


def config(*items: str, methods=("unbalanced", "loss_free"), **changes) -> CompareConfig:
    return CompareConfig(methods=methods, flops=1e9, model=ModelConfig(set=items), **changes)


def items(*args: str, **changes) -> dict[str, tuple[str, ...]]:
    return {name: row.items for name, row in contenders(config(*args, **changes)).items()}


def test_settings_reach_the_methods_that_have_them():
    assert items("bias.rate=0.5", "top_k.renormalize=false") == {
        "unbalanced": ("top_k.renormalize=false",),
        "loss_free": ("bias.rate=0.5", "top_k.renormalize=false"),
    }


def test_a_sweep_gives_each_method_that_has_the_setting_one_row_per_value():
    assert items("top_k.drop=position", sweep=("bias.rate=1e-4,1e-3",)) == {
        "unbalanced": ("top_k.drop=position",),
        "loss_free bias.rate=1e-4": ("top_k.drop=position", "bias.rate=1e-4"),
        "loss_free bias.rate=1e-3": ("top_k.drop=position", "bias.rate=1e-3"),
    }


def test_two_sweeps_give_every_combination():
    both = ("bias.rate=1,2", "top_k.renormalize=true,false")
    assert list(items(sweep=both)) == [
        "unbalanced top_k.renormalize=true",
        "unbalanced top_k.renormalize=false",
        "loss_free bias.rate=1 top_k.renormalize=true",
        "loss_free bias.rate=1 top_k.renormalize=false",
        "loss_free bias.rate=2 top_k.renormalize=true",
        "loss_free bias.rate=2 top_k.renormalize=false",
    ]


def test_experts_that_choose_are_evaluated_by_top_k_unless_the_user_says_how():
    chosen = "expert_choice.evaluation=as_trained"
    assert items(methods=("expert_choice",)) == {"expert_choice": ("expert_choice.evaluation=top_k",)}
    assert items(chosen, methods=("expert_choice",)) == {"expert_choice": (chosen,)}


def test_the_step_of_a_bias_follows_the_length_of_the_run_unless_the_user_chose_it():
    def scaled(*args: str, **changes) -> list[tuple[str, ...]]:
        return [row.scaled(80) for row in contenders(config(*args, **changes)).values()]

    assert scaled() == [(), ("bias.rate=0.019",)]
    assert scaled("bias.rate=0.5") == [(), ("bias.rate=0.5",)]
    assert scaled("bias.rule=linear") == [(), ("bias.rule=linear",)]
    assert scaled("bias.rule='rms'") == [(), ("bias.rule='rms'",)]
    for written in ("sign", "'sign'", '"sign"', " 'sign'", "'sign'  # of the error"):
        assert scaled(f"bias.rule={written}") == [(), (f"bias.rule={written}", "bias.rate=0.019")]
    assert scaled(sweep=("bias.rule=sign,rms",)) == [(), ("bias.rule=sign", "bias.rate=0.019"), ("bias.rule=rms",)]
    assert scaled(sweep=("bias.rate=1,2",)) == [(), ("bias.rate=1",), ("bias.rate=2",)]


def test_the_step_of_a_bias_is_the_published_one_in_a_long_run():
    row = contenders(config())["loss_free"]
    assert [row.scaled(steps) for steps in (1, 700, 1500, 40_000)] == [
        ("bias.rate=1.5",),
        ("bias.rate=0.0021",),
        ("bias.rate=0.001",),
        ("bias.rate=0.001",),
    ]


def test_a_method_whose_own_rule_is_no_sign_keeps_its_step_until_the_user_takes_signs():
    def scaled(*args: str) -> dict[str, tuple[str, ...]]:
        rows = contenders(config(*args, methods=("primal_dual", "kmeans")))
        return {name: row.scaled(80) for name, row in rows.items()}

    assert scaled() == {"primal_dual": (), "kmeans": ("bias.rate=0.019",)}
    assert scaled("bias.rule=sign")["primal_dual"] == ("bias.rule=sign", "bias.rate=0.019")


def test_the_step_joins_all_other_settings_also_those_that_the_user_did_not_choose():
    row = Contender("mine", METHODS["loss_free"], items=("top_k.drop=position", "a.b=1"))
    assert row.scaled(80) == ("top_k.drop=position", "a.b=1", "bias.rate=0.019")


def test_a_run_shares_all_with_the_comparison_but_its_method_settings_seed_and_folder():
    shared = {"optimizer": OptimizerConfig(batch_size=3), "flops": 1e9, "device": "cpu", "dtype": "bf16", "threads": 5}
    model = ModelConfig(dim=24, method="switch", set=("bias.rate=0.5",))
    base = CompareConfig(methods=("unbalanced", "loss_free"), model=model, out="all", **shared)
    run = contenders(base)["loss_free"].run(base, ("bias.rate=0.25",), seed=7, out="one")
    own = ModelConfig(dim=24, method="loss_free", set=("bias.rate=0.25",))
    assert run == TrainConfig(model=own, seed=7, out="one", tensorboard=False, **shared)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"methods": ("swich",)}, r"Unknown method 'swich' \(did you mean 'switch'\?\)"),
        ({"baseline": "loss"}, r"baseline must be one of unbalanced, loss_free, not 'loss' \(did you mean 'loss_free'"),
        ({"baseline": "loss_free", "sweep": ("bias.rate=1,2",)}, "baseline must be one of unbalanced, loss_free bias"),
        ({"sweep": ("quantile.ema=0,0.5",)}, "'quantile.ema=0,0.5' fits none of the methods unbalanced, loss_free"),
        ({"sweep": ("bias.rate=1,2", "bias.rate=3,4")}, "Setting bias.rate is given twice"),
    ],
)
def test_what_does_not_fit_is_refused(change, sentence):
    with pytest.raises(UserError, match=sentence):
        contenders(config(**change))


def test_a_setting_cannot_be_set_and_swept():
    with pytest.raises(UserError, match="given twice"):
        contenders(config("bias.rate=1", sweep=("bias.rate=1,2",)))
