"""The mathematics that every backend shares: a learned Hamiltonian in the hidden space of its first layers."""
