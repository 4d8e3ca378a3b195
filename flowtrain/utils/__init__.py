"""Helpers that know nothing of flows: errors, argument checks, files, ranks, status lines."""
