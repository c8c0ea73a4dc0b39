"""The embedded world: pictures and conversations drawn from a seed, with ground truth, and a small model that sees it.

scene.py decides what there is, draw.py paints it, talk.py talks about it and knows which words need the picture,
dataset.py writes it all in LLaVA's format, evaluate.py asks a model about it, demo.py runs the whole pipeline.
"""
