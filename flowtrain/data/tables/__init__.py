"""The user's own tables: readers, checks, and the samples they become."""
