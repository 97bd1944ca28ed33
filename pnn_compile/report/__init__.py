"""Show results to people: in the terminal, as an HTML page, in a notebook.

In: a compiled network, a plan or a result of another room. Out: tables of `rich`, or HTML. Read
`terminal.py` first, then `page_data.py` and `html.py`; `assets/` contains the page's scripts.
"""
