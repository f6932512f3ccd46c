"""report.html: one file that opens offline, with plots, faces and a threshold explorer.

In: what `metrics.json` holds, and the pairs to show. Out: the page's text.
"""
