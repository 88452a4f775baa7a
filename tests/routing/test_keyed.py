"""Keyed random numbers: uniform, normal, and a function of key, step, place and salt alone."""

import torch

from equipoise.routing.keyed import _mix, new_key, normal, uniform

KEY, STEP = torch.tensor(12345), torch.tensor(7)


def test_one_place_has_one_number():
    first = uniform(KEY, STEP, (101, 7))
    torch.manual_seed(99)
    assert torch.equal(first, uniform(KEY, STEP, (101, 7)))
    assert torch.equal(first.flatten()[:50], uniform(KEY, STEP, (50,)))
    assert first.dtype == torch.float64


def test_every_part_of_the_place_matters():
    draws = [uniform(KEY, STEP, (1000,)), uniform(KEY + 1, STEP, (1000,)), uniform(KEY, STEP + 1, (1000,))]
    draws.append(uniform(KEY, STEP, (1000,), salt=1))
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(4, dtype=torch.float64)
    assert correlation.abs().max() < 0.12  # 3.8 standard errors
    shifted = torch.corrcoef(torch.stack([draws[0][1:], draws[2][:-1]]))
    assert shifted[0, 1].abs() < 0.12


def test_uniform_numbers_are_uniform_and_inside():
    draws = uniform(KEY, STEP, (100_003,))
    assert draws.min() > 0
    assert draws.max() < 1
    count = torch.histc(draws, bins=50, min=0, max=1)
    chi_square = float(((count - 100_003 / 50) ** 2 / (100_003 / 50)).sum())
    assert chi_square < 85.4  # the 99.9 % quantile with 49 degrees of freedom
    assert len(set(draws.tolist())) == len(draws)


def test_normal_numbers_have_their_moments():
    draws = normal(KEY, STEP, (100_003,))
    assert draws.isfinite().all()
    assert abs(draws.mean()) < 0.013
    assert abs(draws.var() - 1) < 0.02
    assert abs((draws**4).mean() - 3) < 0.15


def test_keys_come_from_torchs_generator():
    torch.manual_seed(3)
    first, second = new_key(), new_key()
    torch.manual_seed(3)
    assert new_key() == first != second


def test_the_numbers_are_those_of_splitmix64():
    """Against an independent integer implementation."""

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    base = mix(mix(mix(12345) + 2) + 7)
    expected = [((mix(place + base) >> 12) + 0.5) * 2.0**-52 for place in range(5)]
    assert uniform(KEY, STEP, (5,), salt=2).tolist() == expected


def test_the_largest_hash_stays_below_one():
    """The step for which the first place's hash is all ones, found backwards."""

    def unmix(x: int) -> int:
        x = x ^ (x >> 31) ^ (x >> 62)
        x = x * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
        x = x ^ (x >> 27) ^ (x >> 54)
        x = x * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
        x = x ^ (x >> 30) ^ (x >> 60)
        return (x - 0x9E3779B97F4A7C15) % 2**64

    step = (unmix(unmix(2**64 - 1)) - int(_mix(_mix(KEY)))) % 2**64
    largest = uniform(KEY, torch.tensor(step - 2**64 if step >= 2**63 else step), (1,))
    assert largest.tolist() == [1 - 2.0**-53]
