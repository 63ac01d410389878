"""The running mean of a noisy curve."""

import math

import numpy as np


def running_mean(losses: np.ndarray) -> np.ndarray:
    """Centred mean over 3 % of the steps; skips what is not finite.

    The window widens from a single step at the start, where the loss falls fast and a mean over later
    steps alone would lie below it; at the flat end it loses only its right part.
    """
    count = len(losses)
    here = np.arange(count)
    reach = np.minimum(here, math.ceil(0.015 * count))
    first, last = here - reach, np.minimum(here + reach, count - 1)
    finite = np.isfinite(losses)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, losses, 0.0))])
    weight = np.concatenate([[0], np.cumsum(finite)])
    sums, weights = total[last + 1] - total[first], weight[last + 1] - weight[first]
    return np.where(weights > 0, sums / np.maximum(weights, 1), math.nan)
