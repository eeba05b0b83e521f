"""OODPL (Jia, arXiv 2402.14760): one reward model meta-trained over many domains."""
