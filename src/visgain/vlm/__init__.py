"""Vision-language models: loading one, encoding samples for it, and getting logits where answers are predicted."""
