"""What a comparison found, as a table, as Markdown and as one HTML page."""
