"""Does it work? Every method on a small world with a verifiable reward, three seeds, and what comes of the claims made
for them: ``python -m benchmarks.study``, or ``make study``."""
