"""What Gaussian noise proves, in numbers: epsilon at delta, and how often a reconstruction can succeed.

Neighbours are data sets that differ in one unit (an example, or all of a client) replaced by any other, and the clipped sum of a
release then moves by up to twice the bound. It is what a local guarantee means: the reader of a client's own messages knows who
sent them, so leaving the unit out, and being hidden among other clients, are not among the things he cannot tell. Composition and
subsampling are those of Google's dp-accounting.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator
from statistics import NormalDist

# Renyi orders: any will do, and more of them are a little better and slower.
ORDERS = (1.25, 1.5, 1.75, *range(2, 17), 18, 20, 22, 24, 28, 32, 40, 48, 64, 96, 128, 256)


@functools.lru_cache(maxsize=4096)
def epsilon(noise_multiplier: float, releases: int, delta: float, rate: float = 1.0) -> float:
    """The epsilon of `releases` clipped sums with noise of `noise_multiplier` times the bound, for a replaced unit.

    Exact when every release uses the unit (Balle and Wang 2018, theorem 8; Gaussians compose into one). With `rate` < 1 each one is
    of a uniformly random subset of that share, without replacement, which nobody sees (Wang, Balle and Kasiviswanathan 2019,
    theorem 27, by Renyi divergences).
    """
    import dp_accounting
    from dp_accounting import rdp

    if releases == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    sigma = noise_multiplier / 2
    certain = float(dp_accounting.get_epsilon_gaussian(sigma / math.sqrt(releases), delta))
    if rate >= 1:
        return certain
    whole = 10**9  # the library asks for sizes, and uses their ratio
    one = dp_accounting.SampledWithoutReplacementDpEvent(whole, round(rate * whole), dp_accounting.GaussianDpEvent(sigma))
    accountant = rdp.RdpAccountant(ORDERS, dp_accounting.NeighboringRelation.REPLACE_ONE)
    with _of_the_orders_that_can_be_had():
        return min(certain, float(accountant.compose(one, releases).get_epsilon(delta)))


@functools.lru_cache(maxsize=4096)
def quoted_epsilon(noise_multiplier: float, releases: int, delta: float, rate: float = 1.0) -> float:
    """The epsilon that papers on DP-SGD quote for the same noise: a unit added or removed, and Poisson sampling.

    Smaller than `epsilon`, and of an observer from whom it is hidden who takes part and how many examples a batch has.
    """
    import dp_accounting
    from dp_accounting import rdp

    if releases == 0 or noise_multiplier == 0:
        return 0.0 if releases == 0 else math.inf
    if rate >= 1:
        return float(dp_accounting.get_epsilon_gaussian(noise_multiplier / math.sqrt(releases), delta))
    one = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise_multiplier))
    with _of_the_orders_that_can_be_had():
        return float(rdp.RdpAccountant(ORDERS).compose(one, releases).get_epsilon(delta))


@contextlib.contextmanager
def _of_the_orders_that_can_be_had() -> Iterator[None]:
    """The library warns of orders whose series does not converge, and leaves them out of the smallest, which is still a bound."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def noise_for(target: float, spent: Callable[[float], float]) -> float:
    """The smallest noise multiplier, to a part in ten thousand, whose epsilon `spent(noise_multiplier)` is at most `target`."""
    low, high = 1e-3, 1.0
    while spent(high) > target:
        low, high = high, 2 * high
        if high > 1e6:
            raise ValueError(f"no noise reaches epsilon={target:g}: {spent(high):g} is left at a noise multiplier of a million")
    while high / low > 1.0001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if spent(middle) > target else (low, middle)
    return high


def reconstruction_bound(prior: float, noise_multiplier: float, releases: int = 1) -> float:
    """An upper bound on the chance that a reconstruction succeeds, whatever the attack, if blind guesses do with chance `prior`.

    It is Phi(Phi^-1(prior) + mu) with mu = sqrt(releases) / noise_multiplier: the bound of Hayes, Mahloujifar and Balle (2023) on
    (eta, gamma)-reconstruction robustness (Balle, Cherubin and Hayes 2022), gamma <= sup {P(E): Q(E) <= prior} over events E, where
    P and Q are of what is sent with a unit and without it. Success is such an event for each unit, all have the same Q, under which
    their mean chance is that of a blind guess, and the supremum is concave in it. Of Gaussians, E is a half-space (the closed form
    is in Kaissis et al. 2023), and releases compose into one (Dong, Roth and Su 2022).

    prior  chance of the best guess made without seeing anything, by an attacker who knows all other data
    """
    if not 0 <= prior <= 1:
        raise ValueError(f"prior must be a number in [0, 1], got {prior!r}")
    if prior in (0, 1) or not releases:
        return prior
    if noise_multiplier == 0:
        return 1.0
    mu = math.sqrt(releases) / noise_multiplier
    normal = NormalDist()
    return normal.cdf(normal.inv_cdf(prior) + mu)
