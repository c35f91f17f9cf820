"""Building blocks every drafter is made of: attention, rope, norms, decoder layers, draft cache, draft vocabulary."""
