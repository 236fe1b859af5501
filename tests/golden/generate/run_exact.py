"""Compute exact.npz: batch norm in decimal arithmetic of 60 digits, rounded once to float64.

    python -m pip install numpy==2.4.6 mpmath==1.3.0        # Python 3.11
    python run_exact.py FOLDER

No system: the values that the results of systems are measured against. eps is the decimal number, not its float32 or
float64. Where a formula divides by 0 the result is NaN.
"""

import mpmath
import numpy as np
from archive import CASES, Archive, Case, run

DIGITS = 60
EPS = ("1e-5", "1e-3", "0")


def divide(a, b):
    """a / b, or NaN if b is 0."""
    return a / b if b else mpmath.nan


class Channel:
    """Statistics of one channel, and results with a given eps.

        xhat = (x - mean) r        r = 1 / sqrt(var + eps)        y = gamma xhat + beta
        dx = gamma r (dy - (sum(dy) + xhat sum(dy xhat)) / n) on the n valid elements

    On padding y has the same formula and dx is 0, with a dy of 0 there.
    """

    def __init__(self, x, valid):
        self.x, self.valid = [mpmath.mpf(float(v)) for v in x], valid
        counted = [v for v, is_valid in zip(self.x, valid, strict=True) if is_valid]
        self.n = len(counted)
        self.mean = mpmath.fsum(counted) / self.n
        m2 = mpmath.fsum((v - self.mean) ** 2 for v in counted)
        self.var_biased, self.var_unbiased = m2 / self.n, divide(m2, self.n - 1)

    def compute(self, dy, gamma, beta, eps):
        """y, dx, dgamma and dbeta."""
        dy = [mpmath.mpf(float(d)) if is_valid else mpmath.mpf(0) for d, is_valid in zip(dy, self.valid, strict=True)]
        gamma, beta = mpmath.mpf(float(gamma)), mpmath.mpf(float(beta))
        r = divide(1, mpmath.sqrt(self.var_biased + mpmath.mpf(eps)))
        xhat = [(v - self.mean) * r for v in self.x]
        dbeta = mpmath.fsum(dy)
        dgamma = mpmath.fsum(d * h for d, h in zip(dy, xhat, strict=True) if d)
        y = [gamma * h + beta for h in xhat]
        dx = [
            gamma * r * (d - (dbeta + h * dgamma) / self.n) if is_valid else 0
            for d, h, is_valid in zip(dy, xhat, self.valid, strict=True)
        ]
        return {"y": y, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}


def split_channels(x, mask=None):
    """One `Channel` for each row of x, which has channels last."""
    valid = np.ones(x.shape[:-1], bool) if mask is None else mask
    return [Channel(row, valid.ravel()) for row in x.reshape(-1, x.shape[-1]).T]


def round_all(values):
    """Round numbers, or lists of them, to float64, channels last."""
    return np.array([[float(v) for v in row] if isinstance(row, list) else float(row) for row in values]).T


def compute_statistics(channels, suffix=""):
    """Mean and both variances of each channel."""
    return {
        f"{n}{suffix}": round_all([getattr(c, n) for c in channels]) for n in ("mean", "var_biased", "var_unbiased")
    }


def compute(case, eps, masked=False):
    """Results of a training step with the first batch."""
    case.move_channels(-1)
    with mpmath.workdps(DIGITS):
        channels = split_channels(case.x, case.mask if masked else None)
        rows = case.dy.reshape(-1, len(channels)).T
        inputs = zip(channels, rows, case.gamma, case.beta, strict=True)
        each = [channel.compute(dy, gamma, beta, eps) for channel, dy, gamma, beta in inputs]
        results = {name: round_all([channel[name] for channel in each]) for name in each[0]}
        results |= compute_statistics(channels)
    return results | {name: case.restore(results[name].reshape(case.x.shape)) for name in ("y", "dx")}


def compute_later_statistics(case):
    """Statistics of the second and the third batch."""
    case.move_channels(-1)
    results = {}
    with mpmath.workdps(DIGITS):
        for step in (2, 3):
            results |= compute_statistics(split_channels(case.x_steps[step - 1]), f"_{step}")
    return results


def make():
    """All cases with each eps, and the case `seq` with its mask too."""
    archive = Archive(f"mpmath {mpmath.__version__}, {DIGITS} digits")
    for name in CASES:
        for eps in EPS:
            for config, options in {"eps": {}, "masked_eps": {"masked": True}}.items():
                if options and name != "seq":
                    continue
                archive.add_config(name, config + eps, {"eps": eps, **options})
                archive.add("exact", name, config + eps, compute(Case(name), eps, **options))
        archive.add("exact", name, "stats", compute_later_statistics(Case(name)))
    return archive


if __name__ == "__main__":
    run("exact", make)
