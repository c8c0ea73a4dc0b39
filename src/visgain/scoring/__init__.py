"""Scoring: plan (rows -> parts, samples -> batches), forward (batch -> nll), run (the loop, the parts, resuming)."""
