"""Training: recipes (values), collate (rows -> batches with labels), loss, trainer (the run)."""
