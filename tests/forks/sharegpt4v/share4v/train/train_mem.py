"""Stands for ShareGPT4V's share4v/train/train_mem.py."""

from share4v.train.train import train

if __name__ == "__main__":
    train()
