"""Custom data: reads what users and labeling tools write, checks and draws it."""

from crislit.data.custom.check import read_images, summarize, tabulate
from crislit.data.custom.figures import draw_sheets
from crislit.data.custom.reader import read_custom
from crislit.data.custom.remarks import find_remarks, measure_targets

__all__ = [
    "draw_sheets",
    "find_remarks",
    "measure_targets",
    "read_custom",
    "read_images",
    "summarize",
    "tabulate",
]
