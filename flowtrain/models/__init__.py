"""Model families: functions from the shape of a sample to a flow."""
