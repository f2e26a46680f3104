"""The stage table as a page, a picture and Markdown."""
