"""For tests that compare choices: what another order of summation, or another vector width, may change, and no more."""


def nearly_best(scores, chosen, within=1e-5):
    """Whether the places `chosen` [k] hold the k best of `scores` [n], but for scores that differ by rounding alone."""
    worst = scores.topk(len(chosen)).values[-1]
    return len(set(chosen.tolist())) == len(chosen) and bool((scores[chosen] >= worst - within).all())
