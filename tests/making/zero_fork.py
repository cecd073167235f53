"""What a forked process of a test begins with: importing zero_ranks takes seconds, which only the ranks need."""


def as_rank(*arguments) -> None:
    """Runs one rank; where a process is forked, zero_ranks is imported already."""
    import zero_ranks

    zero_ranks.forked(*arguments)
