"""`visgain analyze --scores`: tables and figures of a finished run of `visgain score`."""

from __future__ import annotations

from visgain.analysis.categories import by_list, by_part_of_speech
from visgain.analysis.gain import gain_tables
from visgain.config import AnalyzeConfig
from visgain.errors import ConfigError
from visgain.scored import data_path, open_scored, read_run
from visgain.tables import Table, write_table


def analyze_scores(config: AnalyzeConfig) -> list[Table]:
    """Write the tables of `config.scores` to `config.out`, each as JSON and as a figure, and return them.

    Raises VisgainError for any mistake of the user's.
    """
    if config.scores is None:
        raise ConfigError("--scores is missing")
    classify = by_list if config.part_of_speech is None else by_part_of_speech(config.part_of_speech)
    run = read_run(config.scores)
    data = data_path(run, config.data)
    dataset = None if data is None else open_scored(run, data, config.image_root)
    tables = gain_tables(config.scores, dataset, classify)
    for table in tables:
        write_table(config.out, table)
    return tables
