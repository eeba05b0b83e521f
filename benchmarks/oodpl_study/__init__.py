"""The study of OODPL over domains; see benchmarks/oodpl.py."""
