"""Public data sets, one file per format; each module registers its formats in `named.FORMATS`."""
