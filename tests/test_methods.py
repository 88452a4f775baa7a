import inspect
import re

import jaxtyping
import pytest
from torch import nn

from equipoise import METHODS, Method, MoE, UserError
from equipoise.balancing import BALANCERS
from equipoise.building import build
from equipoise.methods import find
from equipoise.routing import SCORERS, SELECTORS

SIZES = {"dim": 7, "hidden_dim": 5, "num_experts": 5, "top_k": 2}
ABOUT = dict.fromkeys(("summary", "source", "moves", "traffic", "cost", "use", "avoid"), "none")
TWO_LOSSES = Method("two", **ABOUT, balancers={"balance_loss": {"weight": 0.5}, "z_loss": {}})


def settings_of(part):
    return {p.name for p in inspect.signature(part).parameters.values() if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize("name", METHODS)
def test_every_row_is_complete(name):
    method = METHODS[name]
    assert method.name == name
    assert method.summary.endswith(".")
    assert len(method.summary) > 20
    assert re.search(r"\d{4}\.\d{5}|report", method.source), "a paper, or a report where there is none"
    assert method.scorer in SCORERS
    assert method.selector in SELECTORS
    for part, given in method.balancers.items():
        assert given.keys() <= settings_of(BALANCERS[part])
    for key in method.settings:
        part, _, setting = key.partition(".")
        assert part in (method.scorer, method.selector)
        assert setting in settings_of((SCORERS | SELECTORS)[part])


def test_every_part_is_of_some_use_and_documents_its_source():
    for part in (SCORERS | SELECTORS | BALANCERS).values():
        assert "Source: " in part.__doc__
        assert "Differs: " in part.__doc__


@pytest.mark.parametrize(
    ("name", "causal", "state"),
    [
        ("unbalanced", True, ()),
        ("switch", True, ()),
        ("global_batch", True, ()),
        ("loss_free", True, ("bias",)),
        ("quantile", True, ("quantile",)),
        ("expert_choice", False, ()),
        ("kmeans", True, ("centroid", "bias")),
        ("unipool", True, ("pool_loss",)),
        ("relu", True, ("relu_loss",)),
        ("bip", True, ("bip",)),
        ("sparse_transport", False, ()),
    ],
)
def test_causality_and_state(name, causal, state):
    assert (METHODS[name].causal, METHODS[name].state) == (causal, state)


def test_methods_that_look_ahead_in_training_say_so():
    ahead = {name for name, method in METHODS.items() if method.looks_ahead}
    assert ahead == {
        "expert_choice",
        "token_rounding",
        "selective_sinkhorn",
        "sinkhorn",
        "sparse_transport",
        "base",
    }


def test_the_default_method_is_global_batch():
    layer = MoE(**SIZES)
    assert layer.method == "global_batch"
    assert layer.settings["balance_loss.scope"] == "global"
    assert layer.settings["balance_loss.weight"] == 8e-3


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("switch", {"balance_loss.scope": "micro", "balance_loss.weight": 1e-2}),
        ("loss_free", {"bias.rate": 1e-3, "top_k.renormalize": None}),
        ("quantile", {"quantile.bins": 1000, "quantile.ema": 0.0}),
        ("expert_choice", {"expert_choice.renormalize": False, "expert_choice.evaluation": "refuse"}),
    ],
)
def test_methods_come_with_their_published_settings(name, settings):
    resolved = MoE(**SIZES, method=name).settings
    assert {key: resolved[key] for key in settings} == settings


def test_settings_reach_their_part_by_short_and_by_full_name():
    short = MoE(**SIZES, method="loss_free", rate=0.25, capacity_factor=2.0)
    full = MoE(**SIZES, method="loss_free", **{"bias.rate": 0.25, "top_k.capacity_factor": 2.0})
    for layer in (short, full):
        assert layer.balancers["bias"].rate == 0.25
        assert layer.selector.capacity_factor == 2.0
        assert layer.settings["bias.rate"] == 0.25
    assert short.settings == full.settings


def test_parts_are_made_by_their_names():
    scorer, selector, balancers, resolved = build(METHODS["quantile"], 5, {"bins": 10})
    assert (type(scorer), type(selector)) == (SCORERS["sigmoid"], SELECTORS["top_k"])
    assert isinstance(balancers, nn.ModuleDict)
    assert list(balancers) == ["quantile"]
    assert balancers["quantile"].bins == resolved["quantile.bins"] == 10


def test_a_methods_settings_are_its_own_until_the_user_gives_others():
    method = Method("first", **ABOUT, settings={"top_k.drop": "position", "top_k.capacity_factor": 2.0})
    _, selector, _, resolved = build(method, 5, {"capacity_factor": 1.0})
    assert (selector.drop, selector.capacity_factor) == ("position", 1.0)
    own = {"top_k.drop": "position", "top_k.capacity_factor": 1.0}
    assert resolved == build(method, 5, {})[3] | own


def test_building_twice_shares_nothing():
    first, second = (build(METHODS["loss_free"], 5, {})[2]["bias"] for _ in range(2))
    first.bias_E.fill_(3)
    assert second.bias_E.eq(0).all()
    assert METHODS["switch"].balancers == {"balance_loss": {"scope": "micro", "weight": 1e-2}}


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("lossfree", "loss_free"), ("global", "global_batch"), ("Switch", "switch"), ("expert-choice", "expert_choice")],
)
def test_an_unknown_method_names_the_nearest_and_all(typed, meant):
    with pytest.raises(UserError, match=f"{typed!r}.*did you mean {meant!r}") as error:
        find(typed)
    assert all(name in str(error.value) for name in METHODS)


def test_a_method_like_no_other_is_offered_all():
    with pytest.raises(UserError, match="there are unbalanced") as error:
        MoE(**SIZES, method="xyz")
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("rat", "bias.rate"),
        ("rates", "bias.rate"),
        ("bias.rat", "bias.rate"),
        ("capacity", "top_k.capacity_factor"),
        ("renormalise", "top_k.renormalize"),
    ],
)
def test_an_unknown_setting_names_the_nearest(typed, meant):
    with pytest.raises(UserError, match=f"'loss_free' has no setting {typed!r}.*did you mean {meant!r}"):
        MoE(**SIZES, method="loss_free", **{typed: 1})


def test_a_setting_of_another_method_is_refused_with_the_ones_there_are():
    with pytest.raises(UserError, match=r"no setting 'scope'.*top_k\.renormalize.*bias\.rate"):
        MoE(**SIZES, method="loss_free", scope="micro")


def test_an_ambiguous_setting_asks_for_the_part():
    with pytest.raises(UserError, match=r"'weight'.*ambiguous.*balance_loss\.weight or z_loss\.weight"):
        build(TWO_LOSSES, 5, {"weight": 1.0})
    _, _, balancers, _ = build(TWO_LOSSES, 5, {"z_loss.weight": 0.25})
    assert (balancers["balance_loss"].weight, balancers["z_loss"].weight) == (0.5, 0.25)


def test_one_setting_given_twice_is_refused():
    with pytest.raises(UserError, match=r"bias\.rate.*twice"):
        MoE(**SIZES, method="loss_free", **{"rate": 0.5, "bias.rate": 0.25})


@pytest.mark.parametrize("name", ["quantile", "bip"])
def test_cutoffs_over_all_experts_refuse_a_limit_to_groups(name):
    """Their price is right for a token that may take any expert: with groups, loads settle uneven."""
    sizes = SIZES | {"num_experts": 12, "top_k": 4}
    with pytest.raises(UserError, match=f"{name} .*groups.*loss_free"):
        MoE(**sizes, method=name, groups=4, kept_groups=2)
    assert MoE(**sizes, method=name, groups=4, kept_groups=4).selector.groups == 4
    assert MoE(**sizes, method="loss_free", groups=4, kept_groups=2).selector.kept_groups == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"z_loss": "a"}, "z_loss='a' must be a number"),
        ({"z_loss": True}, "z_loss=True must be a number"),
        ({"z_loss": None}, "z_loss=None must be a number"),
        ({"method": None}, "method=None must be a name, such as 'global_batch'"),
        ({"method": 5}, "method=5 must be a name"),
        ({"num_experts": True}, "num_experts=True is impossible"),
        ({"shared_experts": False}, "shared_experts=False is impossible"),
        ({"method": "loss_free", "rate": 10**400}, r"bias\.rate is too large"),
    ],
)
def test_arguments_of_a_wrong_kind_are_refused_in_one_sentence(monkeypatch, given, words):
    """Without the checks of annotations, which only tests have: what a user meets."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(UserError, match=words):
        MoE(**SIZES | given)
