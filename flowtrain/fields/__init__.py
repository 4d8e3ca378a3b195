"""Velocity fields of continuous flows, with tangents pushed alongside."""
