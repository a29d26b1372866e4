"""Describe the comparisons: agreement between labelers, ties, K, lengths."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from rlhf.generation.answers import Answer
from rlhf.inputs.records import Ranking
from rlhf.measuring.statistics import share_interval


def agreements(first: Ranking, second: Ranking) -> list[float]:
    """Return 1 for each pair on which both labelers agree, 0 where they disagree.

    Pairs that one of them ties or leaves unranked are not counted.
    """
    same = set(second.pairs())
    return [float(pair in same) for pair in first.pairs() if pair in same or pair[::-1] in same]


def agreement(overlap: Sequence[tuple[Ranking, Ranking]], seed: int) -> dict[str, Any]:
    """Return the mean agreement over all pairs, with its 95 % interval over prompts.

    Both are None if there are no pairs. InstructGPT's labelers agree on 72.6 +- 1.5 % (Ouyang et
    al. 2022, 3.4).
    """
    by_prompt = [agreements(first, second) for first, second in overlap]
    values = [value for values in by_prompt for value in values]
    return {
        "agreement": sum(values) / len(values) if values else None,
        "agreement_interval": list(share_interval(by_prompt, seed)) if values else None,
        "num_agreement_pairs": len(values),
        "num_overlap": len(overlap),
    }


def tie_share(rankings: Sequence[Ranking]) -> float:
    """Return the share of pairs of ranked responses that have the same rank."""
    num_pairs = num_ties = 0
    for ranking in rankings:
        ranks = [rank for rank in ranking.ranks if rank is not None]
        num_pairs += len(ranks) * (len(ranks) - 1) // 2
        num_ties += sum(left == right for left, right in combinations(ranks, 2))
    return num_ties / num_pairs if num_pairs else 0.0


def describe_rankings(rankings: Sequence[Ranking]) -> dict[str, Any]:
    """Count rankings, responses, comparisons and ties, and the rankings of each labeler."""
    sizes = Counter(len(ranking.responses) for ranking in rankings)
    labelers = Counter(str(ranking.labeler) for ranking in rankings)
    return {
        "num_rankings": len(rankings),
        "num_responses": sum(size * count for size, count in sizes.items()),
        "num_comparisons": sum(len(ranking.pairs()) for ranking in rankings),
        "num_without_comparison": sum(not ranking.pairs() for ranking in rankings),
        "tie_share": tie_share(rankings),
        "num_rankings_by_k": {size: sizes[size] for size in sorted(sizes)},
        "num_rankings_by_labeler": {name: labelers[name] for name in sorted(labelers)},
    }


def describe_samples(answers: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    """Describe lengths and ends over the answers to all prompts, duplicates included."""
    flat = [answer for group in answers for answer in group]
    lengths = [len(answer.response_ids) for answer in flat]
    return {
        "num_samples": len(flat),
        "eos_rate": sum(answer.is_finished for answer in flat) / len(flat),
        "response_tokens": sum(lengths) / len(flat),
        "response_tokens_max": max(lengths),
    }


LEFT_OUT = {
    "num_duplicates": "responses left out, since another one to their prompt is equal",
    "num_prompts_dropped": "prompts left out for their length",
    "num_prompts_without_choice": "prompts left out, since all their responses are equal",
    "num_without_comparison": "rankings without a comparison, since all responses tie",
}
"""What is printed of a count that is not 0."""


def lines_of(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the stage prints of its results."""
    sizes = results["num_rankings_by_k"]
    yield (
        f"{results['num_rankings']} rankings of {min(sizes)} to {max(sizes)} responses give "
        f"{results['num_comparisons']} comparisons; {results['tie_share']:.1%} of the pairs tie"
    )
    if results["agreement"] is not None:
        low, high = results["agreement_interval"]
        yield (
            f"labelers agree on {results['agreement']:.1%} ({low:.1%} to {high:.1%}) of "
            f"{results['num_agreement_pairs']} pairs that two of them ordered"
        )
    yield (
        f"responses have {results['response_tokens']:.1f} tokens on average, "
        f"{results['response_tokens_max']} at most; {results['eos_rate']:.1%} end"
    )
    for name, what in LEFT_OUT.items():
        if results[name]:
            yield f"{what}: {results[name]}"
