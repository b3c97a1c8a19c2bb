"""What is on disk: the only package that reads or writes data."""
