"""Watches a policy run: free signals, audits by labels, and an alarm that holds at any time."""
