"""Stands for LLaVA-NeXT's llava/train/train_mem.py."""

from llava.train.train import train

if __name__ == "__main__":
    train()
