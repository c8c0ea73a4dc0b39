"""Evaluation: generating answers and scoring them."""
