"""The report of the stage table: an HTML page, an SVG and Markdown."""
