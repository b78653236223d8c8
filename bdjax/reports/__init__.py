"""What a person looks at: tables, the figure of a run, the progress bar."""
