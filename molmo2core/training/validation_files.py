"""What validation leaves beside a training's metrics, whose lines are one a step.  Torch-free."""

VALIDATION = "validation.jsonl"
"""A line for each validation."""
ANSWERS = "answers.jsonl"
"""A line for each step and held-out question that was answered."""
PAGES = "answers"
"""Folder with a page for each such step: the same with pictures."""
