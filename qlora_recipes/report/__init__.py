"""The page of a comparison: one record in, HTML, Markdown, JSON, pictures and tables out. No statistics."""
