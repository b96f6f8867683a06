"""The two papers' claims, put to the numbers of a run: differences of regimes, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .measures import MEASURE, Measure, Spread, by_seed
from .schema import Results

__all__ = ["CLAIMS", "Claim", "Comparison", "Finding", "findings", "verdict"]


@dataclass(frozen=True)
class Claim:
    """What a paper says, and the pairs of regimes (better, worse) to look at."""

    title: str
    text: str
    source: str
    pairs: tuple[tuple[str, str], ...]  # the first is the claim's own


CLAIMS = (
    Claim(
        "Tangent-space fine-tuning",
        "Fine-tuning in tangent space disentangles weights: task vectors add and negate better "
        "than those of non-linear fine-tuning.",
        "Ortiz-Jimenez et al. 2023, arXiv:2305.12827",
        (("ntk", "nonlinear"), ("posthoc", "nonlinear"), ("attention-tangent", "attention")),
    ),
    Claim(
        "Attention-only fine-tuning",
        "Fine-tuning only the linear layers of the attention modules stays near the linear regime: "
        "task vectors combine better than non-linear ones, without the price of linearization.",
        "Jin et al. 2024, arXiv:2407.07089",
        (("attention", "nonlinear"), ("attention", "ntk"), ("attention-tangent", "ntk")),
    ),
)
JUDGED = ("absolute", "normalized", "target", "xi")
VERDICTS = {"better": "✓", "worse": "✗", "undecided": "~"}


@dataclass(frozen=True)
class Comparison:
    """One measure of two regimes: left − right, over the seeds that both have.

    `verdict` is undecided unless the mean difference is larger than its standard deviation over
    the seeds, which takes two seeds at least.
    """

    measure: Measure
    difference: Spread

    @property
    def verdict(self) -> str:
        """`better` or `worse`, of the left regime, or `undecided`."""
        mean, std = self.difference.mean, self.difference.std
        if not (math.isfinite(std) and abs(mean) > std):
            return "undecided"
        better = mean > 0 if self.measure.better == "high" else mean < 0
        return "better" if better else "worse"

    def text(self) -> str:
        """As in `+3.2 ± 0.8 points`."""
        if not self.difference.n:
            return "–"
        factor, digits, unit = self.measure.points
        mean, std = factor * self.difference.mean, factor * self.difference.std
        spread = f" ± {std:.{digits}f}" if math.isfinite(std) else ""
        return f"{mean:+.{digits}f}{spread}{unit}".replace("-", "−")


@dataclass(frozen=True)
class Finding:
    """A claim's pair of regimes in this run."""

    left: str
    right: str
    comparisons: tuple[Comparison, ...]
    cost: str

    def sentence(self) -> str:
        """What the pair says about the claim, in words."""
        phrases: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
        single: list[str] = []
        for comparison in self.comparisons:
            phrase = f"{NAMES[comparison.measure.key]} {comparison.text()}"
            if comparison.difference.n == 1:
                single.append(phrase)
            elif comparison.difference.n:
                phrases[comparison.verdict].append(phrase)
        parts = [
            f"better in {', '.join(phrases['better'])}" if phrases["better"] else "",
            f"worse in {', '.join(phrases['worse'])}" if phrases["worse"] else "",
            f"no difference beyond the seeds' spread in {', '.join(phrases['undecided'])}"
            if phrases["undecided"]
            else "",
            f"with one seed, so undecided, {', '.join(single)}" if single else "",
        ]
        said = "; ".join(part for part in parts if part) or "nothing measured for both"
        return f"{self.left} against {self.right}: {said}.{self.cost}"


NAMES = {
    "absolute": "merged accuracy",
    "normalized": "normalised accuracy",
    "target": "negated target accuracy",
    "xi": "ξ",
}


def compare(results: Results, left: str, right: str, key: str) -> Comparison:
    """The difference of a measure between two regimes, seed by seed."""
    measure = MEASURE[key]
    a, b = by_seed(results, left, measure), by_seed(results, right, measure)
    return Comparison(measure, Spread.over([a[seed] - b[seed] for seed in a if seed in b]))


def _cost(results: Results, left: str, right: str) -> str:
    a, b = results.regimes[left], results.regimes[right]
    parts = []
    if math.isfinite(a.seconds_per_step) and b.seconds_per_step > 0:
        parts.append(f"{a.seconds_per_step / b.seconds_per_step:.2f} × the time per step")
    if a.peak_bytes and b.peak_bytes:
        parts.append(f"{a.peak_bytes / b.peak_bytes:.2f} × the memory")
    return f" Training costs {' and '.join(parts)}." if parts else ""


def verdict(pairs: Sequence[Finding]) -> str:
    """What a claim's first pair of regimes says about it, in a sentence."""
    if not pairs:
        return "This run has none of the pairs of regimes that the claim is about."
    first = pairs[0]
    verdicts = [c.verdict for c in first.comparisons if c.difference.n]
    better, worse = verdicts.count("better"), verdicts.count("worse")
    said = {
        (True, False): "The numbers support the claim",
        (False, True): "The numbers contradict the claim",
        (True, True): "The numbers support the claim in part",
        (False, False): "The numbers do not decide the claim",
    }[better > 0, worse > 0]
    return (
        f"{said}: {first.left} is better than {first.right} in {better} of {len(verdicts)} "
        f"measures, worse in {worse}."
    )


def findings(results: Results, claim: Claim) -> list[Finding]:
    """One for every pair of `claim` whose regimes this run has."""
    return [
        Finding(
            results.regimes[left].label,
            results.regimes[right].label,
            tuple(compare(results, left, right, key) for key in JUDGED),
            _cost(results, left, right),
        )
        for left, right in claim.pairs
        if left in results.regimes and right in results.regimes
    ]
