"""Every check and a short training on a small random model of each architecture: what works, what is refused and why.

`architectures.py` states what each repository on the hub holds, `vocabularies.py` and `make.py` write a small one like
it, `examine.py` takes it through this package, and `results.py` shows what came out.
"""
