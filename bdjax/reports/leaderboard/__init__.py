"""The leaderboard: one static page of all runs below some directories, and their records as CSV and Parquet."""
