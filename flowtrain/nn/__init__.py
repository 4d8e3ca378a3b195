"""Networks: conditioners of couplings, velocity fields of continuous flows, and their divergence."""
