"""What `python -m fastres.profile` consists of: variants (what is compared), trace (what it says), report (what stays
behind)."""
