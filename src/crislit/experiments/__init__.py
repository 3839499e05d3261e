"""The paper's tables and figures, and the record of measured runs."""
