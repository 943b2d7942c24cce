"""The version of the code, which every row and export names; kept below all rooms."""

__version__ = "0.1.0"
