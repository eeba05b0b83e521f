"""OODPL (Jia, arXiv 2402.14760): a reward model meta-trained over many domains."""
