"""Epsilon, the noise for an epsilon, and the steps that fit: against closed forms, integrals and other accountants."""

import builtins
import json
import math
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import GaussianAccountant, PRVAccountant, RDPAccountant
from scipy import integrate, optimize, stats

from federated.errors import PrivacyError
from federated.privacy import accounting, opacus_accountants, pld
from federated.privacy.account import NOT_PROTECTED, Account, accounts_of, privacy_record
from federated.privacy.accounting import ACCOUNTANTS, GaussianSteps, epsilon, noise_for, steps_within

DELTA = 1e-5
QUICK = GaussianSteps(1.0, 0.16, 50)


def exact_gaussian(noise, steps, target_delta=DELTA):
    """Balle and Wang 2018, theorem 8: what Gaussians without sampling cost exactly."""
    sigma = noise / math.sqrt(steps)

    def excess(value):
        upper = stats.norm.cdf(1 / (2 * sigma) - value * sigma)
        return upper - math.exp(value + stats.norm.logcdf(-1 / (2 * sigma) - value * sigma)) - target_delta

    return optimize.brentq(excess, 0, 500)


def dense_renyi(noise, sampling, order):
    """The divergence by its own integral, in float64."""

    def integrand(z):
        loss = np.logaddexp(np.log1p(-sampling), np.log(sampling) + (2 * z - 1) / (2 * noise**2))
        return np.exp(order * loss + stats.norm.logpdf(z, scale=noise))

    middle = order
    total, _ = integrate.quad(
        integrand, middle - 12 * noise - middle, middle + 12 * noise, points=[0, middle], limit=1000
    )
    return math.log(total) / (order - 1)


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (5.0, 20), (20.0, 300), (0.5, 1)])
@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_without_sampling_it_bounds_the_exact_gaussian(noise, steps, accountant):
    exact = exact_gaussian(noise, steps)
    found = epsilon([GaussianSteps(noise, 1.0, steps)], DELTA, accountant=accountant)
    assert exact <= found <= exact * (1.25 if accountant == "rdp" else 1.02)


@pytest.mark.parametrize("noise", [0.4, 0.8, 1.5, 4.0, 12.0])
@pytest.mark.parametrize("sampling", [0.001, 0.03, 0.3, 0.7, 0.97])
def test_the_curve_is_its_integral_at_whole_and_broken_orders(noise, sampling):
    for order in (1.05, 1.3, 1.9, 2.0, 2.5, 3.0, 6.7, 11.0):
        found = opacus_accountants._renyi(noise, sampling, order)
        truth = dense_renyi(noise, sampling, order)
        assert found >= truth * (1 - 1e-6) - 1e-9
        assert found == pytest.approx(truth, rel=1e-3, abs=1e-8) or found == math.inf


@pytest.mark.parametrize(
    ("noise", "sampling", "steps"), [(0.5, 0.01, 250), (1.0, 0.2, 10), (1.0, 0.8, 50), (3.0, 0.05, 250)]
)
def test_it_is_opacus_or_less_and_never_less_than_pld(noise, sampling, steps):
    accountant = RDPAccountant()
    accountant.history = [(noise, sampling, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the best order is outside of its list
        theirs = accountant.get_epsilon(DELTA)
    ours = epsilon([GaussianSteps(noise, sampling, steps)], DELTA)
    assert ours <= theirs * (1 + 1e-9)
    assert epsilon([GaussianSteps(noise, sampling, steps)], DELTA, accountant="pld") <= ours


def test_prv_is_that_of_opacus_within_its_error():
    accountant = PRVAccountant()
    accountant.history = [(1.0, 0.16, 20), (2.0, 0.5, 5)]
    theirs = accountant.get_epsilon(DELTA, eps_error=0.01)
    ours = epsilon([GaussianSteps(1.0, 0.16, 20), GaussianSteps(2.0, 0.5, 5)], DELTA, accountant="prv")
    assert ours == pytest.approx(theirs, abs=0.05)


@pytest.mark.parametrize(("noise", "steps"), [(300.0, 10), (0.1, 200)])
def test_the_best_order_may_be_outside_of_the_list_of_opacus(noise, steps):
    """Opacus warns and hands back the bound of its last order; here there is no warning, and less is proven."""
    accountant = RDPAccountant()
    accountant.history = [(noise, 1.0, steps)]
    with pytest.warns(UserWarning, match="Optimal order is the"):
        theirs = accountant.get_epsilon(DELTA)
    assert epsilon([GaussianSteps(noise, 1.0, steps)], DELTA) < 0.99 * theirs


def test_tight_accountants_agree():
    events = [GaussianSteps(1.0, 0.032, 250), GaussianSteps(2.0, 0.1, 40)]
    by = {name: epsilon(events, DELTA, accountant=name) for name in ACCOUNTANTS}
    assert by["pld"] == pytest.approx(by["prv"], rel=0.02)
    assert by["pld"] < by["rdp"]


def test_the_published_figures():
    """Noise for epsilon 8 over 50 rounds of 5 steps, and epsilon at noise 1, of 100 and of 500 examples."""
    for examples, noise in ((20, 8.10), (50, 3.36), (100, 1.82), (500, 0.73), (2000, 0.52)):
        assert noise_for(8.0, DELTA, sampling=16 / examples, steps=250) == pytest.approx(noise, abs=0.006)
    assert epsilon([GaussianSteps(1.0, 0.16, 250)], DELTA) == pytest.approx(20.8, abs=0.1)
    assert epsilon([GaussianSteps(1.0, 0.032, 250)], DELTA) == pytest.approx(3.77, abs=0.01)


def test_the_central_limit_would_say_less_than_is_spent():
    """Why GDP is no certificate."""
    with pytest.warns(UserWarning, match="can underestimate privacy expenditure"):
        accountant = GaussianAccountant()
    accountant.history = [(0.6, 0.032, 500)]
    assert accountant.get_epsilon(DELTA) < epsilon([GaussianSteps(0.6, 0.032, 500)], DELTA, accountant="pld")
    with pytest.raises(PrivacyError, match=r"'gdp'; it is a limit, not a bound.*expected one of rdp, prv, pld"):
        epsilon([QUICK], DELTA, accountant="gdp")


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_nothing_costs_nothing_and_no_noise_costs_all(accountant):
    assert epsilon([], DELTA, accountant=accountant) == 0.0
    assert epsilon([GaussianSteps(0.0, 0.5, 0), GaussianSteps(0, 1, 0)], DELTA, accountant=accountant) == 0.0
    assert epsilon([QUICK, GaussianSteps(0.0, 0.5, 1)], DELTA, accountant=accountant) == math.inf
    assert epsilon([QUICK, GaussianSteps(1e-200, 1.0, 1)], DELTA, accountant=accountant) == math.inf


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_much_noise_costs_little(accountant):
    assert 0 <= epsilon([GaussianSteps(1e4, 0.01, 1)], DELTA, accountant=accountant) < 0.01
    assert epsilon([GaussianSteps(1e4, 1.0, 1)], 0.5, accountant=accountant) == 0.0


@pytest.mark.parametrize("accountant", ["prv", "pld"])
def test_where_epsilon_says_nothing_the_bound_of_rdp_does(accountant):
    events = [GaussianSteps(0.05, 0.5, 10)]
    assert epsilon(events, DELTA, accountant=accountant) == epsilon(events, DELTA) > 1000


steps_events = st.builds(
    GaussianSteps,
    st.sampled_from([0.5, 1.0, 2.0, 8.0]),
    st.sampled_from([0.01, 0.2, 1.0]),
    st.integers(min_value=0, max_value=60),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(steps_events, max_size=4), steps_events, st.randoms(use_true_random=False))
def test_composition(events, more, chance):
    """Order and cuts do not matter; more steps, less noise and a smaller target_delta never cost less."""
    whole = epsilon(events, DELTA)
    shuffled = list(events)
    chance.shuffle(shuffled)
    cut = [GaussianSteps(one.noise_multiplier, one.sampling, 1) for one in shuffled for _ in range(one.steps)]
    assert epsilon(shuffled, DELTA) == pytest.approx(whole, rel=1e-9)
    assert epsilon(cut, DELTA) == pytest.approx(whole, rel=1e-9)
    assert epsilon([*events, more], DELTA) >= whole * (1 - 1e-9)
    assert epsilon(events, DELTA / 100) >= whole * (1 - 1e-9)
    louder = [GaussianSteps(2 * one.noise_multiplier, one.sampling, one.steps) for one in events]
    assert epsilon(louder, DELTA) <= whole * (1 + 1e-9)


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
@pytest.mark.parametrize("spent", [(), (GaussianSteps(2.0, 0.5, 20),)])
def test_noise_for_is_the_least(accountant, spent):
    noise = noise_for(8.0, DELTA, sampling=0.16, steps=50, spent=spent, accountant=accountant)

    def cost(value):
        return epsilon([*spent, GaussianSteps(value, 0.16, 50)], DELTA, accountant=accountant)

    assert cost(noise) <= 8.0 < cost(noise / 1.001)


@pytest.mark.parametrize("target", [0.02, 0.5, 3.0, 60.0, 900.0])
@pytest.mark.parametrize("sampling", [0.002, 0.5, 1.0])
def test_noise_for_over_the_whole_range(target, sampling):
    noise = noise_for(target, DELTA, sampling=sampling, steps=100)
    assert epsilon([GaussianSteps(noise, sampling, 100)], DELTA) <= target
    assert epsilon([GaussianSteps(noise / 1.001, sampling, 100)], DELTA) > target


def test_noise_for_steps_that_only_a_tight_accountant_can_fit():
    """What is spent is already above the target by rdp, and below it by prv."""
    spent = [GaussianSteps(1.0, 0.032, 250)]
    by_rdp, by_prv = (epsilon(spent, DELTA, accountant=name) for name in ("rdp", "prv"))
    target = (by_rdp + by_prv) / 2
    noise = noise_for(target, DELTA, sampling=0.032, steps=10, spent=spent, accountant="prv")
    assert epsilon([*spent, GaussianSteps(noise, 0.032, 10)], DELTA, accountant="prv") <= target
    with pytest.raises(PrivacyError, match=r"with the most noise \(10000\) it is 3\.77, of which 3\.77 was spent"):
        noise_for(target, DELTA, sampling=0.032, steps=10, spent=spent)


def test_where_there_is_no_power_law_it_looks_in_the_middle():
    crossing = accounting._crossing
    assert crossing(1.0, 4.0, known={1.0: 8.0, 4.0: 2.0}, target=4.0) == pytest.approx(2.0)
    assert crossing(1.0, 4.0, known={1.0: math.inf, 4.0: 2.0}, target=4.0) == 2.0
    assert crossing(1.0, 4.0, known={1.0: 8.0, 4.0: 0.0}, target=4.0) == 2.0


def test_noise_for_no_steps_is_none():
    assert noise_for(1.0, DELTA, sampling=0.5, steps=0) == 0.0


def test_unreachable_says_what_was_asked_and_what_is_possible():
    with pytest.raises(PrivacyError) as caught:
        noise_for(0.001, DELTA, sampling=0.8, steps=1000, most=100.0)
    assert str(caught.value) == (
        "epsilon 0.001 at target_delta 1e-05 cannot be kept over 1000 steps with sampling 0.8: with the most noise "
        "(100) it is 1.026; ask for a larger epsilon or fewer steps"
    )


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_steps_within_is_the_last_that_fits(accountant):
    more = {"noise_multiplier": 1.0, "sampling": 0.16, "accountant": accountant}
    steps = steps_within(12.0, DELTA, spent=[QUICK], **more)
    cost = [epsilon([QUICK, GaussianSteps(1.0, 0.16, n)], DELTA, accountant=accountant) for n in (steps, steps + 1)]
    assert cost[0] <= 12.0 < cost[1]


def test_steps_within_has_an_end():
    assert steps_within(8.0, DELTA, noise_multiplier=100.0, sampling=0.001, most=1000) == 1000
    assert steps_within(8.0, DELTA, noise_multiplier=0.0, sampling=0.5) == 0
    assert steps_within(0.5, DELTA, noise_multiplier=1.0, sampling=0.16, spent=[QUICK]) == 0


@pytest.mark.parametrize("value", [0.0, 1.0, -1e-5, math.nan, math.inf, "1e-5", True])
def test_target_delta_out_of_range(value):
    with pytest.raises(PrivacyError, match=r"target_delta = .*: expected a probability above 0 and below 1"):
        epsilon([QUICK], value)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, None])
def test_target_epsilon_out_of_range(value):
    with pytest.raises(PrivacyError, match=r"target_epsilon = .*: expected a number above 0"):
        noise_for(value, DELTA, sampling=0.5, steps=1)
    with pytest.raises(PrivacyError, match=r"target_epsilon = .*: expected a number above 0"):
        steps_within(value, DELTA, noise_multiplier=1.0, sampling=0.5)


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ((-1.0, 0.5, 1), "noise_multiplier = -1.0: expected a number, at least 0"),
        ((math.nan, 0.5, 1), "noise_multiplier = nan"),
        (("1", 0.5, 1), "noise_multiplier = '1'"),
        ((True, 0.5, 1), "noise_multiplier = True"),
        ((1.0, 0.0, 1), "sampling = 0.0: expected a number, above 0 and at most 1"),
        ((1.0, 1.5, 1), "sampling = 1.5"),
        ((1.0, math.inf, 1), "sampling = inf"),
        ((1.0, 0.5, -1), r"steps = -1: expected a whole number from 0 to 1e\+09"),
        ((1.0, 0.5, 1.0), "steps = 1.0"),
        ((1.0, 0.5, True), "steps = True"),
        ((1.0, 0.5, 10**10), "steps = 10000000000"),
    ],
)
def test_events_out_of_range(event, said):
    with pytest.raises(PrivacyError, match=said):
        GaussianSteps(*event)


def test_events_are_plain_data():
    plain = json.loads(json.dumps(GaussianSteps(1, 1, 3).to_dict()))
    assert plain == {"kind": "gaussian_steps", "noise_multiplier": 1.0, "sampling": 1.0, "steps": 3}
    assert GaussianSteps.from_dict(plain) == GaussianSteps(1.0, 1.0, 3)
    for wrong in ({**plain, "kind": "laplace"}, {**plain, "more": 1}, {"kind": "gaussian_steps"}, None, []):
        with pytest.raises(PrivacyError, match="not an event of kind gaussian_steps"):
            GaussianSteps.from_dict(wrong)
    with pytest.raises(PrivacyError, match="steps"):
        GaussianSteps.from_dict({**plain, "steps": "3"})


def test_no_warning_filter_or_log_is_left_behind(caplog):
    before = list(warnings.filters)
    for accountant in ACCOUNTANTS:
        epsilon([QUICK, GaussianSteps(50.0, 1.0, 2)], DELTA, accountant=accountant)
    assert warnings.filters == before
    assert caplog.records == []


@pytest.mark.parametrize(
    ("accountant", "missing", "said"),
    [
        ("rdp", "opacus", r"Opacus, which is not installed; pip install federated-peft\[privacy\]"),
        ("prv", "opacus", r"Opacus, which is not installed; pip install federated-peft\[privacy\]"),
        ("pld", "dp_accounting", r"dp-accounting, which is not installed; pip install federated-peft\[pld\], or set"),
    ],
)
def test_without_the_library_it_says_what_to_install(accountant, missing, said, monkeypatch):
    for cached in (opacus_accountants._opacus, pld._dp_accounting, opacus_accountants._renyi, accounting._computed):
        cached.cache_clear()
    imported = builtins.__import__

    def blocked(name, *rest):
        if name.partition(".")[0] == missing:
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(PrivacyError, match=said):
        epsilon([QUICK], DELTA, accountant=accountant)


def test_some_other_order_is_a_bound_too():
    assert opacus_accountants._lowest(lambda order: math.inf, (2, 3, 4)) == 2
    assert opacus_accountants._lowest(lambda order: -order, (2, 3, 4)) == 4


def test_an_order_whose_series_cancels_out_proves_nothing(monkeypatch):
    def fails(**arguments):
        if not float(arguments["orders"]).is_integer():
            raise ValueError("The result of subtraction must be non-negative.")
        return -1.0 if arguments["orders"] == 3.0 else real.curve(**arguments)

    real = opacus_accountants._opacus()
    whole = epsilon([GaussianSteps(0.77, 0.5, 40)], DELTA)
    opacus_accountants._renyi.cache_clear()
    accounting._computed.cache_clear()
    monkeypatch.setattr(opacus_accountants, "_opacus", lambda: opacus_accountants._Opacus(fails, real.prv))
    assert whole < epsilon([GaussianSteps(0.77, 0.5, 40)], DELTA) < math.inf
    opacus_accountants._renyi.cache_clear()
    accounting._computed.cache_clear()


@pytest.mark.parametrize(("answer", "said"), [(math.nan, "it found nan"), (RuntimeError("no mesh"), "no mesh")])
def test_a_prv_without_an_answer_is_one_clear_error(answer, said, monkeypatch):
    class Composed:
        def compute_epsilon(self, *_):
            if isinstance(answer, Exception):
                raise answer
            return 0.0, 0.0, answer

    real = opacus_accountants._opacus().prv
    monkeypatch.setattr(real, "compose_heterogeneous", lambda *_: Composed())
    with pytest.raises(PrivacyError, match=rf"the prv accountant finds no epsilon here \({said}\); set privacy.accou"):
        epsilon([QUICK], DELTA, accountant="prv")


# ---- accounts --------------------------------------------------------------------------------------------------------

ACCOUNT = Account("example", 7.9, DELTA, "rdp", "none claimed")


def test_account_stands_in_a_manifest_and_comes_back():
    record = privacy_record([ACCOUNT, Account("client", math.inf, DELTA, "pld", "poisson", private=False, steps=3)])
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["accounts"][1]["epsilon"] is None
    first, second = accounts_of(record)
    assert first == ACCOUNT
    assert (second.epsilon, second.private, second.steps) == (math.inf, False, 3)
    assert first.not_protected == NOT_PROTECTED
    assert first.neighbouring == "add or remove one"


def test_nothing_accounted():
    assert privacy_record([]) is None
    assert accounts_of(None) == ()


@pytest.mark.parametrize("wrong", [{}, {"accounts": None}, {"accounts": {}}])
def test_another_privacy_record(wrong):
    with pytest.raises(PrivacyError, match="expected a list of accounts"):
        accounts_of(wrong)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"unit": "user"}, "unit 'user'"),
        ({"accountant": "gdp"}, "by 'gdp'"),
        ({"epsilon": -1.0}, "epsilon -1.0"),
        ({"epsilon": "8"}, "epsilon '8'"),
        ({"epsilon": math.nan}, "epsilon nan"),
        ({"target_delta": 1.0}, "target_delta 1.0"),
        ({"target_delta": True}, "target_delta True"),
        ({"private": 1}, "whose words are not text"),
        ({"sampling": None}, "whose words are not text"),
        ({"not_protected": [3]}, "whose words are not text"),
        ({"not_protected": "metrics"}, "not an account"),
        ({"steps": -1}, "steps -1"),
        ({"target_epsilon": math.inf}, "target_epsilon inf"),
        ({"noise_multiplier": "1"}, "noise_multiplier '1'"),
        ({"more": 1}, "not an account"),
    ],
)
def test_account_that_is_none(change, said):
    with pytest.raises(PrivacyError, match=said):
        Account.from_dict({**ACCOUNT.to_dict(), **change})
    with pytest.raises(PrivacyError, match="not an account"):
        Account.from_dict([])


def test_the_tight_accountant_holds_nobody_s_standard_error() -> None:
    """absl would close it when logging is set up anew: somebody's redirected file, or a test's."""
    from absl import logging as absl_logging

    epsilon([GaussianSteps(1.0, 1.0, 1)], 1e-5, accountant="pld")
    assert absl_logging.get_absl_handler().python_handler.stream is sys.__stderr__
