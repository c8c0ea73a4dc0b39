"""Stands for TinyLLaVA's tinyllava/train/train.py."""

from support import Tokenizer, read_arguments
from support import train as go
from tinyllava.data.dataset import make_supervised_data_module


def train():
    arguments = read_arguments()
    tokenizer = Tokenizer(arguments.tokenizer, arguments.model_max_length)
    go(make_supervised_data_module(tokenizer=tokenizer, data_args=arguments)["train_dataset"], arguments)


if __name__ == "__main__":
    train()
