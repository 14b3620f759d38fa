"""The sign-off document: one HTML file that opens offline, written from stored records only."""

from harness.report.page import write_report

__all__ = ["write_report"]
