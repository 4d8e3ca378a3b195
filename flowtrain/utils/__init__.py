"""General helpers that do not depend on flows: errors, argument checks, files, ranks, progress display."""
