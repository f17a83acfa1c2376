"""What people look at: sections for a terminal, the page of a run (HTML and Markdown), two runs compared.

`page` draws, and is imported where a page is written: matplotlib takes its time.
"""
