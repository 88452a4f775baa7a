"""Which rows a comparison has, and with which settings."""

import pytest

from equipoise.config import CompareConfig, ModelConfig
from equipoise.errors import UserError
from equipoise.training.contenders import contenders


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
    assert scaled("bias.rule=sign") == [(), ("bias.rule=sign", "bias.rate=0.019")]
    assert scaled(sweep=("bias.rule=sign,rms",)) == [(), ("bias.rule=sign", "bias.rate=0.019"), ("bias.rule=rms",)]
    assert scaled(sweep=("bias.rate=1,2",)) == [(), ("bias.rate=1",), ("bias.rate=2",)]


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
