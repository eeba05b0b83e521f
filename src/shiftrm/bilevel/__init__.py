"""The parts of `shiftrm.hypergradient`: likelihoods, the inner loop, products with derivatives."""
