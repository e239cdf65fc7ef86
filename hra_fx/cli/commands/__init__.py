"""One file for each command: its options, and how its answer is printed. What it does is imported when it runs."""
