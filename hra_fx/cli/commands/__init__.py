"""One file per command: its options and its output. The implementation is imported when the command runs."""
