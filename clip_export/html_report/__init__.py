"""The report of a verification as one HTML file, for a person: the verdict first, then what it rests on.

The file asks for nothing from anywhere: style and pictures are inside it, and a content policy forbids the rest.
"""

from clip_export.html_report.contents import (
    Check,
    CheckGroup,
    Environment,
    Figure,
    IndexSafety,
    Item,
    MeasuredRow,
    RankFlip,
    ReportContents,
    Retrieval,
    Similarities,
    Verdict,
)
from clip_export.html_report.page import page, write_report

__all__ = [
    "Check",
    "CheckGroup",
    "Environment",
    "Figure",
    "IndexSafety",
    "Item",
    "MeasuredRow",
    "RankFlip",
    "ReportContents",
    "Retrieval",
    "Similarities",
    "Verdict",
    "page",
    "write_report",
]
