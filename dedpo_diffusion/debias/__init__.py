"""Human and judge labels of the same pairs, merged into one target and one weight per pair.

The pair loss `softplus(m) - label * m` is affine in its label. So DeDPO's debiased objective (arXiv 2602.06195),

    mean over all n pairs of loss(m, g)  +  mean over the n_l labelled of [ loss(m, z) - loss(m, g) ]

with human labels z and judge labels g, is an ordinary weighted loss, `weight * softplus(m) - weight * target * m`, whose
targets and weights depend on the labels alone: merging happens once, before training. A *power* lam in [0, 1] scales the
judge's part, as in PPI++ (arXiv 2311.01453): 0 recovers training on the human labels, 1 the objective above, and every
fixed power is unbiased for labels taken at random, whatever the judge, as long as the judge did not learn from these human
labels; so are powers fitted to the labels of other pairs (`cross_fitted`). A power tuned to the labels that it is used with is
unbiased up to terms of order 1 / labels. Several judges have one power each.

    merging.py     merge_labels: the whole of it
    estimate.py    the same without the report
    weights.py     labels, inverse propensities and powers -> weights and targets
    imputation.py  method adapted: the best prediction for every pair, between imputation and DeDPO
    compute.py     the power and the worth of the labels in a run of finite length
    label_share.py how much of a run the pairs get that people labelled, with method adapted
    powers.py      the powers that make the gradient's variance at margin 0 least
    tuning.py      the powers of a rule, of all pairs or of each fold
    clusters.py    labels that depend on each other, such as those of one ranking
    worth.py       agreement, bias, effective human labels, with intervals
    report.py      the report and its sentences
    propensity.py  probabilities of being labelled, estimated
    density_ratio.py  labels of another population of pairs: how much each counts for the target's

Public: merge_labels, Merged, power_cap, estimate_propensity, inverse_propensity.
May import: core.
"""

from __future__ import annotations

from dedpo_diffusion.debias.clusters import cluster_sums, effective_number
from dedpo_diffusion.debias.coefficients import METHODS, RULES, inverse_propensity, mix_judges, pair_targets, pair_weights
from dedpo_diffusion.debias.compute import Run, best_scale, hard_power, run_report, run_terms
from dedpo_diffusion.debias.density_ratio import DensityRatio, carry_over, estimate_density_ratio, shifted_mean
from dedpo_diffusion.debias.estimate import Estimate, estimate
from dedpo_diffusion.debias.imputation import Correction, answer_weight, hard_targets, james_stein, odd_directions
from dedpo_diffusion.debias.label_share import Shares, best_share, judge_worth, share_labels
from dedpo_diffusion.debias.merging import Merged, merge_labels
from dedpo_diffusion.debias.powers import Fit, best_powers, fit_power, fit_powers, judge_moments, power_cap
from dedpo_diffusion.debias.propensity import Propensity, estimate_propensity
from dedpo_diffusion.debias.report import run_sentences
from dedpo_diffusion.debias.worth import (
    NORMAL_975,
    RESAMPLES,
    Basis,
    agreement,
    bootstrap_sums,
    judge_bias,
    share_interval,
    variance_ratio,
    wilson_interval,
)

__all__ = [
    "METHODS",
    "NORMAL_975",
    "RESAMPLES",
    "RULES",
    "Basis",
    "Correction",
    "DensityRatio",
    "Estimate",
    "Fit",
    "Merged",
    "Propensity",
    "Run",
    "Shares",
    "agreement",
    "answer_weight",
    "best_powers",
    "best_scale",
    "best_share",
    "bootstrap_sums",
    "carry_over",
    "cluster_sums",
    "effective_number",
    "estimate",
    "estimate_density_ratio",
    "estimate_propensity",
    "fit_power",
    "fit_powers",
    "hard_power",
    "hard_targets",
    "inverse_propensity",
    "james_stein",
    "judge_bias",
    "judge_moments",
    "judge_worth",
    "merge_labels",
    "mix_judges",
    "odd_directions",
    "pair_targets",
    "pair_weights",
    "power_cap",
    "run_report",
    "run_sentences",
    "run_terms",
    "share_interval",
    "share_labels",
    "shifted_mean",
    "variance_ratio",
    "wilson_interval",
]
