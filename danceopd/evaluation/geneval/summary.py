"""Sums up GenEval's results."""

from danceopd.support.texts import many


def summary(records: list[dict]) -> dict:
    """Sums up the lines of a results file, in shares from 0 to 1.

    Overall is the mean of the tags' shares of right pictures. A prompt is right if any picture of it is; prompts are
    told apart by their whole metadata.

    Returns:
        {"overall", "tags": {tag: {"score", "correct", "pictures"}}, "pictures", "prompts", "correct_pictures",
        "correct_prompts"}.
    """
    tags: dict[str, list[bool]] = {}
    prompts: dict[str, bool] = {}
    for line in records:
        tags.setdefault(line["tag"], []).append(line["correct"])
        prompts[line["metadata"]] = prompts.get(line["metadata"], False) or line["correct"]
    scores = {t: {"score": sum(v) / len(v), "correct": sum(v), "pictures": len(v)} for t, v in tags.items()}
    return {
        "overall": sum(score["score"] for score in scores.values()) / len(scores),
        "tags": scores,
        "pictures": len(records),
        "prompts": len(prompts),
        "correct_pictures": sum(line["correct"] for line in records) / len(records),
        "correct_prompts": sum(prompts.values()) / len(prompts),
    }


def format_summary(scores: dict) -> str:
    """Writes the summary as lines of text."""
    lines = [
        f"{tag:16s} {100 * score['score']:6.2f} %   {score['correct']} of {score['pictures']}"
        for tag, score in scores["tags"].items()
    ]
    return "\n".join(
        [
            *lines,
            f"{'overall':16s} {scores['overall']:.5f}    the mean of {many(len(lines), 'tag')}",
            f"right: {scores['correct_pictures']:.2%} of {many(scores['pictures'], 'picture')}; at least one picture "
            f"of {scores['correct_prompts']:.2%} of {many(scores['prompts'], 'prompt')}",
        ]
    )
