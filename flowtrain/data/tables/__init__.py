"""Tables from the user's files or memory: readers, checks, and conversion to samples."""
