"""GenEval: its rules, its folders, drawing and scoring."""

from danceopd.evaluation.geneval.layout import read_metadata
from danceopd.evaluation.geneval.rules import Found, check_picture

judge = check_picture  # as scripts outside the package call it

__all__ = ["Found", "check_picture", "judge", "read_metadata"]
