"""What people look at: the HTML page, terminal tables, a picture, provenance. No torch."""
