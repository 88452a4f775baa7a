"""The surface and its frontier, against numbers computed by hand and by search."""

import numpy as np
import pytest
from scaling_grids import SURFACES
from scipy.optimize import minimize_scalar

from equipoise.scaling import Surface


def test_a_loss_by_hand():
    assert Surface(1.5, 8.0, 9.0, 1 / 3, 0.5).loss(1000.0, 900.0) == pytest.approx(1.5 + 0.8 + 0.3)


@pytest.mark.parametrize("name", SURFACES)
@pytest.mark.parametrize("factor", [6.0, 7.3])
def test_the_best_size_is_where_a_search_finds_it(name, factor):
    surface, flops = SURFACES[name], 3e20

    def loss(log_params):
        params = np.exp(log_params)
        return surface.loss(params, flops / (factor * params))

    found = minimize_scalar(loss, bounds=(5, 40), method="bounded", options={"xatol": 1e-10})
    assert surface.best_params(flops, factor) == pytest.approx(np.exp(found.x), rel=1e-6)
    assert surface.best_loss(flops, factor) == pytest.approx(found.fun, rel=1e-12)
    assert surface.best_params(flops, factor) * surface.best_tokens(flops, factor) == pytest.approx(flops / factor)


def test_sizes_grow_with_their_exponents():
    surface = SURFACES["asymmetric"]
    assert surface.params_exponent == pytest.approx(0.25)
    assert surface.tokens_exponent == pytest.approx(0.75)
    assert surface.best_params(1e22) / surface.best_params(1e20) == pytest.approx(100**0.25)


def test_published_optimal_tokens():
    """arXiv 2603.22339, table of raw data: 408.2 billion, 4.04 trillion, 45.1 quadrillion tokens at 1e24 FLOPs."""
    tokens = [SURFACES[name].best_tokens(1e24) for name in ("symmetric", "Chinchilla", "asymmetric")]
    assert [f"{value:.2e}" for value in tokens] == ["4.08e+11", "4.04e+12", "4.51e+16"]


def test_several_surfaces_at_once():
    one, two = SURFACES["symmetric"], SURFACES["package"]
    both = Surface(*np.array([one, two]).T)
    assert both.best_params(1e20).tolist() == pytest.approx([one.best_params(1e20), two.best_params(1e20)])


def test_what_is_worth_nothing_gets_nothing():
    useless = Surface(1.5, 0.0, 9.0, 0.3, 0.3)
    assert useless.best_params(1e20) == 0
    assert useless.best_tokens(1e20) == np.inf
    assert useless.best_loss(1e20) == 1.5
