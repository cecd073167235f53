"""GenEval: its rules, its folders, drawing and scoring."""
