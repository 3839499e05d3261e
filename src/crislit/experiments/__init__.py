"""The paper's tables and figures, and the record of measured runs."""

from crislit.experiments.paper import TABLE1
from crislit.experiments.report import write_report
from crislit.experiments.runs import collect, group_by_setting
from crislit.experiments.tables import tables_by_name

__all__ = [
    "TABLE1",
    "collect",
    "group_by_setting",
    "tables_by_name",
    "write_report",
]
