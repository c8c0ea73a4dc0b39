"""What the scores say: measured against ground truth, word classes and perturbations."""
