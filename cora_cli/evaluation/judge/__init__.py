"""Answers judged by a language model, among anchors that show what the judge is worth."""
