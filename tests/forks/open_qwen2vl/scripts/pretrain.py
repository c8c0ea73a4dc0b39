"""Stands for prismatic's scripts/pretrain.py; where the package is installed and not found by path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from prismatic.preprocessing.datasets.datasets import make
from support import Tokenizer, read_arguments, train

if __name__ == "__main__":
    arguments = read_arguments()
    train(make(arguments, Tokenizer(arguments.tokenizer, arguments.model_max_length)), arguments)
