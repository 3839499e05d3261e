"""The paper's tables and figures, and the record of measured runs."""

from crislit.experiments.paper import TABLE1
from crislit.experiments.report import write_report
from crislit.experiments.runs import collect, group_by_setting
from crislit.experiments.tables import fill_blocks, readme_tables

__all__ = [
    "TABLE1",
    "collect",
    "fill_blocks",
    "group_by_setting",
    "readme_tables",
    "write_report",
]
