"""Results for people: tables, figures, the HTML page of a purification, and the progress bar."""
