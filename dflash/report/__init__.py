"""What people look at: tables for a terminal, a page of a run (HTML and Markdown), two runs compared. No jax.

`page` draws, and is imported where a page is written: matplotlib takes its time.
"""

from dflash.report.text import acceptance_table, audit_lines, category_table, speedup_table, step_table, training_lines

__all__ = ["acceptance_table", "audit_lines", "category_table", "speedup_table", "step_table", "training_lines"]
