"""What checks annotations while the tests run: beartype, with an int where a float is wanted, as Python has it."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
