"""Ablations: arms (what is trained on) x seeds, on the embedded world or the user's data, as a table and a figure."""
