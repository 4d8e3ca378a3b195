"""Runs of a few steps, by the commands."""

SMALL = ["trainer.steps=4", "trainer.batch_size=16", "trainer.plot_every=null", "data.n_val=20", "data.n_test=50"]
TINY = ["model.hidden=[8]", "solver.rtol=1e-3"]
