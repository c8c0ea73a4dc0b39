"""Every error that a user can cause, as one small tree.

VisgainError
├── ConfigError      an option, a YAML key or a combination of them is wrong
│   └── UnknownName  a name that no registry holds; carries suggestions
├── DataError        a dataset, an image folder or one image is wrong
│   └── ImageError   one image cannot be used; becomes the row's skip reason
├── ModelError       a model folder, processor or chat template cannot be used
├── EncodingError    one sample cannot be encoded; becomes the row's skip reason
├── TrainingError    a training diverged
├── JudgeError       a judge cannot be reached, refuses, or says what nobody can read
└── StorageError     an output folder is unwritable, full, damaged or belongs to another run

The command line prints the message of any of these on one line and exits with 1 (2 for ConfigError); anything else is
a defect of ours and keeps its traceback. A message says what is wrong, where, and what to do.
"""

from __future__ import annotations


class VisgainError(Exception):
    """A mistake that the user can mend. `exit_code` is what the command line exits with."""

    exit_code = 1


class ConfigError(VisgainError):
    """An option, a configuration key, or a combination of them is not valid."""

    exit_code = 2


class UnknownName(ConfigError):
    """A name that the registry does not hold."""


class DataError(VisgainError):
    """A dataset or its image folder cannot be read, or changed since it was scored."""


class ImageError(DataError):
    """One image cannot be used. The row is skipped and the message is its reason."""


class ModelError(VisgainError):
    """A model folder, its processor or its chat template cannot be used."""


class EncodingError(VisgainError):
    """One sample cannot be turned into tokens. The row is skipped and the message is its reason."""


class TrainingError(VisgainError):
    """Losses or gradients of a training are no numbers any more."""


class JudgeError(VisgainError):
    """A judge cannot be reached, refuses, or too many of its replies cannot be read."""


class StorageError(VisgainError):
    """An output folder cannot be written, is damaged, or belongs to a run with another configuration."""
